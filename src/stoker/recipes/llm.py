"""Train a causal language model: from scratch, or by full or LoRA fine-tuning.

Text is packed into rows of `sequence_length` tokens without attention across documents, and
the loss is the mean over the tokens of the whole global batch. Heavy imports are inside
`train`, so that a mistyped key is reported immediately.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from stoker.data.called import VALUES, check_values
from stoker.duration import Duration
from stoker.engine import keys
from stoker.engine.keys import Betas, Length, Names, Patterns, Warmup, Weighted
from stoker.engine.settings import Training
from stoker.errors import BadInput
from stoker.language.lora import Lora
from stoker.language.rope import RopeScaling
from stoker.user_run import Run
from stoker.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stoker.data import sources
    from stoker.language.building import Language
    from stoker.language.objective import Objective
    from stoker.language.rows import Rows

PRELOAD = (
    "stoker.engine.quiet",
    "peft",
    *(
        f"stoker.language.{room}"
        for room in ("adapters", "building", "data", "export", "generation", "objective")
    ),
)


_NOT_IN_A_PIPELINE = (
    "router_aux_loss={:g} with parallel=pipeline: no rank sees the routers of all stages; train with "
    "router_aux_loss=0, or with parallel=fsdp"
)


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Keys of `stoker train llm`."""

    model: str = "tiny"
    """A size to train from scratch (tiny, small, base), a directory, s3://bucket/folder, or a hub id."""
    data: Weighted = "python-docs"
    """Texts, prompt-completion pairs or conversations: python-docs or python-docs-qa (built in), a .jsonl,
    .json, .csv, .txt or .parquet file, a folder of these, a URL such as s3://..., or a hub dataset: org/name,
    org/name@revision, org/name#config/split, org/name#/train[:20%]. Several sources with weights: a:3,b:1."""
    validation_data: Names | None = None
    """Like data: evaluated during training instead of the share `validation` of data. With several sources,
    a,b, each has a separate loss."""
    test_data: Names | None = None
    """Like data: used for the final test instead of the share `test` of data."""
    columns: dict[str, str | dict[str, str]] = field(default_factory=dict)
    """The names of the fields in your data; only the fields given here are read: {text: body}, {prompt: q,
    completion: a}, {messages: dialog, role: speaker, content: utterance}. For one of several sources:
    {b.jsonl: {text: body}}."""
    streaming: bool = False
    """Tokenise the data during training rather than beforehand; the length of an epoch is then an
    estimate."""
    loss_on: Literal["answer", "last", "all"] = "answer"
    """For pairs and conversations: learn all assistant turns, only the last one, or everything."""
    chat_template: str | None = None
    """Template that turns conversations into text: chatml, llama3, gemma, mistral, alpaca, a directory or hub
    id whose tokenizer has a template, or a Jinja file; default: the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra values passed to the template with each conversation, unless its record sets them:
    {enable_thinking: false}."""
    tokenizer: str | None = None
    """A directory or hub id; default: the model's own, or for a new model one trained on the data."""
    add_tokens: tuple[str, ...] = ()
    """Special tokens to add to the tokenizer, such as ["<|im_start|>", "<|im_end|>"]; the model gets an
    embedding for each, which starts as the mean of all embeddings and is trained."""
    vocab_size: Annotated[int, Ge(300)] = 4096
    """Vocabulary size of a tokenizer trained by this run."""
    tie_embeddings: bool = True
    """For a new model: share one matrix between the token embeddings and the output layer. A pipeline needs
    false."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    lora: Lora = field(default_factory=Lora)
    train_only: Patterns = ()
    """Without adapters: train only the weights whose names match one of these patterns, such as
    ["layers.(30|31)", lm_head]; all others are frozen."""
    neftune: Annotated[float, Ge(0)] = 0.0
    """Noise on the embeddings during training, as NEFTune's alpha (arXiv:2310.05914), such as 5; 0: none."""
    router_aux_loss: Annotated[float, Ge(0)] | None = None
    """For a mixture of experts: weight of the loss that balances their use in training, such as 0.001; 0:
    none; default: the model's own, if its config has output_router_logits."""
    quantisation: Literal["none", "nf4"] = "none"
    """Keep the frozen weights in 4 bits (QLoRA; extra `quantisation`)."""
    kernels: Literal["torch", "liger"] = "torch"
    """liger: fused norms, rotary embeddings and feed-forward layers, on GPUs only (extra `liger`)."""
    lr: Annotated[float, Gt(0)] | None = None
    """Peak learning rate; default: 3e-3 from scratch, 2e-4 with LoRA, 2e-5 for other fine-tuning."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """How the learning rate decays after the warm-up."""
    warmup: Warmup = 0.05
    """Length of the learning-rate warm-up: a share of the steps, such as 0.05, or a number, such as 100."""
    min_lr: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the peak learning rate at which cosine, linear and wsd end."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """AdamW's decoupled weight decay."""
    decay_all: bool = False
    """Also apply weight decay to norms, biases and all other one-dimensional parameters."""
    optimizer: Literal["adamw", "muon", "sgd", "adafactor", "adamw8bit"] = "adamw"
    """AdamW, Muon, SGD with momentum, Adafactor, or AdamW with 8-bit states (extra `quantisation`). Muon
    takes the matrices between the embeddings and the head, at the same learning rate, and AdamW the rest."""
    betas: Betas = (0.9, 0.95)
    """Decay rates of AdamW's moving averages of the gradient and of its square (also with 8-bit states)."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Term that AdamW adds to the denominator for numerical stability (also with 8-bit states)."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Maximum global L2 norm of the gradient; larger gradients are scaled down to it."""
    max_steps: Length | None = None
    """How long to train: 100 (steps), 2ep or 1000000tok."""
    epochs: Annotated[float, Gt(0)] | None = None
    """The same in epochs; 1 if neither is given."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Rows per step, over all ranks."""
    sequence_length: Annotated[int, Ge(2)] = 256
    """Tokens per row."""
    packing: bool = True
    """Pack several documents into a row, without attention between them."""
    eval_every: Length | None = Duration(1, "epoch")
    """How often to measure perplexity on the validation documents and generate text; none: only before and
    after training."""
    patience: Annotated[int, Ge(1)] | None = None
    """End early once val_loss has not improved for this many evaluations; none: never."""
    load_best: bool = False
    """Test and export the weights with the best val_loss, not the last ones; implies checkpoint_best."""
    validation: Annotated[float, Ge(0), Lt(0.5)] = 0.05
    """Share of the documents held out for evaluation during training; 0: none."""
    test: Annotated[float, Ge(0), Lt(0.5)] = 0.05
    """Share of the documents held out for the final test; 0: none."""
    prompts: tuple[str, ...] = ()
    """Prompts for generations, formatted with the chat template if there is one; default: two of the
    validation documents."""
    generate_tokens: Annotated[int, Ge(0)] = 64
    """Tokens per generation; 0: no generations."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed for the weights, the order of the data, and dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(VALUES, self.chat_template_kwargs)
        for share in ("validation", "test"):
            value = getattr(self, share)
            if getattr(self, f"{share}_data") is not None and value not in (0, getattr(Config, share)):
                raise ValueError(
                    f"{share}={value:g} is the share of data to hold out, but {share}_data replaces it: "
                    "give only one of the two"
                )
        if self.patience is not None and not self.validation and self.validation_data is None:
            raise ValueError(
                f"patience={self.patience} watches val_loss, but with validation=0 nothing is held out: set "
                "validation to a share above 0, or omit patience"
            )
        if self.load_best and not self.validation and self.validation_data is None:
            raise ValueError(
                "load_best=true asks for the best val_loss, but with validation=0 nothing is held out: set "
                "validation to a share above 0, or omit load_best"
            )
        if self.patience is not None and self.eval_every is None:
            raise ValueError(
                f"patience={self.patience} counts evaluations during training, but with eval_every=none "
                "there are none: set eval_every to a length, or omit patience"
            )
        if self.prompts and not self.generate_tokens:
            raise ValueError(
                "prompts are given, but generate_tokens=0 makes no generations: omit one of the two"
            )
        keys.check_length(self.max_steps, self.epochs)
        if self.quantisation != "none" and (not self.lora.used or self.lora.dora):
            raise ValueError(
                f"quantisation={self.quantisation} is for weights frozen under LoRA: "
                + ("DoRA needs them in full precision" if self.lora.dora else "set lora.rank")
            )
        if self.streaming and self.data_share < 1:
            raise ValueError(
                f"data_share={self.data_share:g} with streaming=true: the samples of a stream are not known "
                "in advance; omit streaming=true, or shorten training with max_steps"
            )
        if self.add_tokens and self.lora.adapter is not None:
            raise ValueError(
                f"lora.adapter={self.lora.adapter} keeps the tokens that it was trained with, and cannot get "
                "new ones: omit add_tokens, or train a new adapter"
            )
        if self.train_only and self.lora.used:
            raise ValueError(
                "train_only with lora: LoRA trains only the adapters, see lora.targets and "
                "lora.modules_to_save; omit one of the two"
            )
        if self.router_aux_loss and self.parallel == "pipeline":
            raise ValueError(_NOT_IN_A_PIPELINE.format(self.router_aux_loss))
        if not all(text.strip() for text in self.add_tokens):
            raise ValueError("add_tokens: an empty or blank token cannot be added")

    @property
    def named(self) -> dict[sources.Key, str]:
        """The data sources that the config names, by key."""
        found: dict[sources.Key, str] = {"data": self.data}
        if self.validation_data is not None:
            found["validation_data"] = self.validation_data
        if self.test_data is not None:
            found["test_data"] = self.test_data
        return found

    @property
    def length(self) -> Duration:
        """How long to train."""
        return self.max_steps or Duration(self.epochs or 1.0, "epoch")


def check_launch(config: Config) -> None:
    """Check what can be checked before any process is started. Raises BadInput."""
    from stoker.data import sources
    from stoker.language import chat_template, hub, shape

    if config.chat_template is not None:
        chat_template.read(config.chat_template)
    sources.check(config.named, config.columns)
    is_new = config.model in shape.SIZES
    if is_new:
        keys.warn_of_folder(config.model)
    model = None if is_new else hub.find(config.model, known=tuple(shape.SIZES), weights=False)
    if config.rope_scaling.used:
        _check_scaling(config, model)
    elif model is not None:
        shape.check_positions(config.model, shape.positions(model), config.sequence_length)
    if config.tokenizer is not None:
        hub.check_tokenizer(config.tokenizer)
    _check_targets(config, model)
    if config.router_aux_loss:
        from stoker.language import building, routing

        routing.attach(building.empty(config.model, model), config.router_aux_loss)
    if config.lora.adapter is not None:
        _check_adapter(config, config.lora.adapter, model)
    if config.kernels != "torch":
        from stoker.language import kernels

        kernels.check(config.kernels)
    if config.quantisation != "none":
        from stoker.language import quantised

        quantised.check()


def _check_scaling(config: Config, model: Path | None) -> None:
    """Raises BadInput if the model's positions cannot be scaled, or are too few all the same."""
    from stoker.language import building, rope, shape

    if model is None:
        raise BadInput(
            f"{config.rope_scaling}: a new model has as many positions as sequence_length: omit rope_scaling"
        )
    scaled = building.load_config(model)
    rope.scale(scaled, config.rope_scaling, config.model)
    longest, factor = building.positions(scaled), config.rope_scaling.factor or 1.0
    shape.check_positions(config.model, longest, config.sequence_length, factor)


def _check_targets(config: Config, model: Path | None) -> None:
    """Raises BadInput. Loads torch only if the model's files do not list its modules."""
    from stoker.language import shape

    if config.train_only:
        from stoker.language import building, targets

        targets.train_only(building.empty(config.model, model), config.train_only)
    names = (*config.lora.names, *config.lora.trained_whole)
    if not names or (model is not None and shape.has_modules(model, names)):
        return
    from stoker.language import building, targets

    empty = building.empty(config.model, model)
    targets.resolve(empty, config.lora)
    targets.whole(empty, config.lora, grown=False)


def check_ranks(config: Config, ranks: int) -> None:
    """Raises BadWorldSize if the model cannot be split into so many stages, BadInput if into none."""
    if config.parallel == "pipeline":
        from stoker.language import shape

        stages = (config.pipeline.ranks or ranks) * config.pipeline.stages_of_a_rank
        shape.check_stages(config.model, stages=stages, tied=config.tie_embeddings)


def _check_adapter(config: Config, adapter: str, model: Path | None) -> None:
    """Part of `check_launch`. A model from the hub may not have all its weights downloaded yet."""
    from stoker import store_urls
    from stoker.language import hub, saved_adapters

    folder = hub.find(adapter, "lora.adapter")
    saved_adapters.check(folder, model=config.model, origin=model, quantised=config.quantisation != "none")
    saved_adapters.check_scaling(folder, config.rope_scaling)
    here = store_urls.is_url(config.model) or Path(config.model).expanduser().is_dir()
    if (model is None or here) and World.current().rank == 0:
        saved_adapters.check_weights(folder, model or config.model)


def _check_base(config: Config) -> None:
    """Raises BadInput if an adapter of a new model would be trained: nobody else has its random weights."""
    from stoker.language.shape import SIZES

    if config.lora.used and config.model in SIZES:
        raise BadInput(
            f"lora trains an adapter of a model that there is, but model={config.model} is a new one of that "
            "size: name the model, a folder or a hub id, or omit lora to train all weights"
        )


def train(run: Run, config: Config) -> None:
    """Read and pack the data, build the model, train, test, export."""
    from stoker import distributed
    from stoker.data import tokens
    from stoker.engine import memory, optimizers, schedule
    from stoker.engine.random_state import seed_everything
    from stoker.language import (
        adapters,
        building,
        data,
        data_messages,
        export,
        flops,
        generation,
        perplexity,
        targets,
    )  # fmt: skip
    from stoker.recipes import exporting, resuming
    from stoker.trainer import Trainer

    if not run.continued:
        _check_base(config)
    seed_everything(config.seed)
    distributed.join(run.world, config.backend)
    found, language, rows = _read(run, config)
    packing = config.packing and language.packs
    data_messages.say(run, config.named, found, rows, packed=packing, wanted=config.packing)
    language = dataclasses.replace(language, tokenizer=data.as_asked(found, language.tokenizer))
    prompts = data.prompts(
        found, language.tokenizer, config.prompts, positions=building.positions(language.config),
        values=config.chat_template_kwargs,
    )  # fmt: skip
    model = _as_trained(run, language, config)
    frozen = language.pretrained and not all(p.requires_grad for p in model.parameters())
    called = _called(model, config)
    lr = config.lr or default_lr(config.lora.used, language.pretrained)
    needed = flops.per_token(model, context=rows.train.context, labelled=rows.train.labelled)
    with adapters.advising(config.lora, config.quantisation):
        trainer = Trainer(
            run,
            model,
            optimizer=optimizers.asked_for(
                config,
                lr=lr,
                faster=adapters.faster(model, config.lora),
                hidden=functools.partial(targets.hidden, model),
            ),
            inputs=called.inputs,
            loss=called.loss,
            schedule=schedule.build(config.schedule, warmup=config.warmup, floor=config.min_lr),
            training=dataclasses.replace(config, checkpoint_best=True) if config.load_best else config,
            load=adapters.loading(language.load),
        )
    if not run.world.planned:  # a planned run's weights may not have been downloaded
        resuming.check_base(run, language.fingerprint, frozen=frozen)
        exporting.record_shape(trainer, functools.partial(export.describe, model, language))
    run.params(**adapters.settings(model, config.lora), **({} if config.lr else {"lr": lr}))

    how: dict[str, Any] = {
        "batch_size": config.batch_size,
        "collate": functools.partial(tokens.collate, trimmed=not packing and trainer.strategy != "pipeline"),
    }

    def evaluate() -> None:
        perplexity.log_validation(trainer, rows.validation, flops=needed, **how)
        generation.log_generations(trainer, language, prompts, config.generate_tokens)
        run.table("memory", trainer.memory(), memory.COLUMNS)

    if trainer.steps_done == 0 and language.pretrained:
        perplexity.log(trainer, "base_test_perplexity", rows.test, **how)
        evaluate()
    elif trainer.steps_done == 0:
        perplexity.log_validation(trainer, rows.validation, flops=needed, **how)
    loader = trainer.loader(rows.train, **how)
    for batch in trainer.steps(loader, max_steps=config.length):
        run.log(loss=trainer.step(batch), **trainer.step_metrics())
        if trainer.every(10) or trainer.last:
            run.log(trainer.performance(needed))
        if (config.eval_every is not None and trainer.every(config.eval_every)) or trainer.last:
            evaluate()
            if config.patience is not None and trainer.stale("val_loss", config.patience):
                trainer.finish(f"val_loss did not improve for {config.patience} evaluations")
    if config.load_best:
        trainer.load_best()
    perplexity.log(trainer, "test_perplexity", rows.test, **how)
    export.export(trainer, language, model)


def _read(run: Run, config: Config) -> tuple[Sequence[sources.Source], Language, Rows]:
    """The data, the model with its tokenizer, and the data as tokens."""
    from stoker import distributed
    from stoker.engine.precision import DTYPES
    from stoker.language import adapters, building, chat_template, hub
    from stoker.recipes import resuming
    from stoker.trainer import computed_in

    frozen = DTYPES[computed_in(run, config)] if config.lora.used else DTYPES["fp32"]
    with distributed.rank_zero_first(run.world):
        found = read_sources(config)
        language = building.build(
            config.model,
            tokenizer=adapters.tokenizer_for(config.tokenizer, config.lora),
            vocab_size=config.vocab_size,
            sequence_length=config.sequence_length,
            documents=[document for source in found for document in source.splits.train],
            tie_embeddings=config.tie_embeddings,
            dtype=frozen,
            chat_template=config.chat_template,
            add_tokens=config.add_tokens,
            grows=adapters.brings_tokens(config.lora),
            rope_scaling=config.rope_scaling,
            planned=run.world.planned > 0,
        )
        rows = packed(config, found, language.tokenizer, language.packs)
    if not language.pretrained:
        resuming.check_tokens(run, language.tokenizer.get_vocab())
    if not run.world.planned:
        model = config.model if language.pretrained else None
        template = None if config.chat_template in chat_template.NAMES else config.chat_template
        beside = {"tokenizer": config.tokenizer, "chat_template": template}
        hub.record(run, {"model": model, **beside, "lora.adapter": config.lora.adapter})
    return found, language, rows


def read_sources(config: Config) -> list[sources.Source]:
    """The texts and conversations that the config names, split."""
    from stoker.data.sources import read_all

    return read_all(
        config.data, validation=config.validation, test=config.test, streaming=config.streaming,
        validation_data=config.validation_data, test_data=config.test_data, columns=config.columns,
    )  # fmt: skip


def packed(config: Config, found: Sequence[sources.Source], tokenizer: Any, packs: bool) -> Rows:
    """These as rows of tokens.

    Args:
        packs: whether the model can keep apart documents that share a row.
    """
    from stoker.language import data

    return data.pack(
        found, tokenizer, sequence_length=config.sequence_length, loss_on=config.loss_on,
        packing=config.packing and packs, values=config.chat_template_kwargs,
    )  # fmt: skip


def _as_trained(run: Run, language: Language, config: Config) -> Any:
    """The model with its adapters, in 4 bits if asked for, and with the parts frozen that no text passes."""
    from stoker.language import adapters, noise, quantised, targets

    targets.freeze_what_no_text_goes_through(language.model)
    targets.train_only(language.model, config.train_only, grown=language.added_tokens > 0)
    if config.quantisation == "nf4":
        quantised.convert(language.model, run.world)
    model = adapters.adapted(language, config.lora, compare=run.world.rank == 0)
    noise.add(model, config.neftune)
    targets.say(run, model)
    return model


def _called(model: Any, config: Config) -> Objective:
    """How the model is called, with its kernels. Raises BadInput."""
    from stoker.language import kernels, objective

    called = objective.attach(model, config.router_aux_loss)
    if called.routing is not None and config.parallel == "pipeline":
        raise BadInput(_NOT_IN_A_PIPELINE.format(called.routing.weight))
    kernels.use(model, config.kernels)
    return called


def default_lr(lora: bool, pretrained: bool) -> float:
    """The peak learning rate if none is given."""
    if not pretrained:
        return 3e-3
    return 2e-4 if lora else 2e-5
