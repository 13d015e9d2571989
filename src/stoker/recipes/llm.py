"""Train a causal language model: from scratch, or fine-tuned whole or with LoRA.

Text is packed into rows of `sequence_length` tokens without attention across documents, and
the loss is the mean over the tokens of the whole global batch. Heavy imports stand inside
`train`, so that a mistyped key is answered at once.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from stoker.attempt import Run
from stoker.data.called import VALUES, check_values
from stoker.duration import Duration
from stoker.engine.keys import Betas, Length, Names, Patterns, Warmup, Weighted
from stoker.engine.options import Training
from stoker.language.lora import Lora
from stoker.world import World

if TYPE_CHECKING:
    from stoker.data import sources
    from stoker.language.building import Language

PRELOAD = (
    "stoker.engine.quiet",
    "peft",
    *(
        f"stoker.language.{room}"
        for room in ("adapters", "building", "data", "export", "generation", "objective")
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Keys of `stoker train llm`."""

    model: str = "tiny"
    """A size to start from scratch (tiny, small, base), a directory, s3://bucket/folder, or a hub id."""
    data: Weighted = "python-docs"
    """python-docs or python-docs-qa (built in), a .jsonl, .json, .csv, .txt or .parquet file, a folder of
    these, a URL such as s3://..., or a hub dataset: org/name, org/name@revision, org/name#config/split.
    Texts, pairs, conversations. Several with weights: a:3,b:1."""
    validation_data: Names | None = None
    """As data, to be evaluated on while training in place of the share `validation` of data. Of several, a,b,
    each has a loss of its own."""
    test_data: Names | None = None
    """As data, for the final test in place of the share `test` of data."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the data call the fields that are read, and only these are: {text: body}, {prompt: q, completion:
    a}, {messages: dialog, role: speaker, content: utterance}."""
    streaming: bool = False
    """Tokenise the data as training comes to it, not beforehand; an epoch is an estimate then."""
    loss_on: Literal["answer", "last", "all"] = "answer"
    """Of pairs and conversations: learn what the assistant says, its last turn alone, or everything."""
    chat_template: str | None = None
    """How conversations are written: chatml, llama3, gemma, mistral, alpaca, a directory or hub id whose
    tokenizer has one, or a file of Jinja; by default the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the template is given beside each conversation, where its record has no other: {enable_thinking:
    false}."""
    tokenizer: str | None = None
    """A directory or hub id; by default the model's own, and for a new model one trained on the data."""
    add_tokens: tuple[str, ...] = ()
    """Special tokens that the tokenizer is to have, such as ["<|im_start|>", "<|im_end|>"]; the model gets an
    embedding for each, which begins as the mean of all and is trained."""
    vocab_size: Annotated[int, Ge(300)] = 4096
    """Entries of a tokenizer that is trained here."""
    tie_embeddings: bool = True
    """Of a new model: one matrix embeds tokens and predicts them. A pipeline needs false."""
    lora: Lora = field(default_factory=Lora)
    train_only: Patterns = ()
    """Without adapters: train those weights alone in whose names one of these patterns is found, such as
    ["layers.(30|31)", lm_head]; all others stay as they are."""
    neftune: Annotated[float, Ge(0)] = 0.0
    """Noise on the embeddings while training, as NEFTune's alpha (arXiv:2310.05914), such as 5; 0: none."""
    quantisation: Literal["none", "nf4"] = "none"
    """Keep the frozen weights in 4 bits (QLoRA; extra `quantisation`)."""
    kernels: Literal["torch", "liger"] = "torch"
    """On GPUs: liger's fused norms, rotary embeddings and feed-forward layers (extra `liger`)."""
    lr: Annotated[float, Gt(0)] | None = None
    """Peak learning rate; by default 3e-3 from scratch, 2e-4 with LoRA, 2e-5 for every weight."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """How the learning rate goes down after the warm-up."""
    warmup: Warmup = 0.05
    """Over which the learning rate goes up: a share of the steps, such as 0.05, or how many, such as 100."""
    min_lr: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the peak that cosine, linear and wsd end at."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """AdamW's decoupled weight decay."""
    decay_all: bool = False
    """Weight decay of norms and biases too, and of all else that has one dimension."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw8bit"] = "adamw"
    """AdamW, SGD with momentum, Adafactor, or AdamW with 8-bit states (extra `quantisation`)."""
    betas: Betas = (0.9, 0.95)
    """Decay of the means that AdamW, in 8 bits too, keeps of the gradient and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """What AdamW, in 8 bits too, adds to the root of the latter."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Largest global L2 norm of the gradient; larger ones are scaled down to it."""
    max_steps: Length | None = None
    """How long to train: 100 (steps), 2ep or 1000000tok."""
    epochs: Annotated[float, Gt(0)] | None = None
    """The same in epochs; 1 where neither is given."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Rows of a step, over all ranks."""
    sequence_length: Annotated[int, Ge(2)] = 256
    """Tokens of a row."""
    packing: bool = True
    """Whether documents share rows, none of them seeing another."""
    eval_every: Length | None = Duration(1, "epoch")
    """Perplexity on the validation documents, and generations; none: before and after training alone."""
    patience: Annotated[int, Ge(1)] | None = None
    """End early once val_loss got no better over so many evaluations; none: never."""
    validation: Annotated[float, Ge(0), Lt(0.5)] = 0.05
    """Share of the documents held out for evaluation while training; 0: none."""
    test: Annotated[float, Ge(0), Lt(0.5)] = 0.05
    """Share of the documents held out for the final test; 0: none."""
    prompts: tuple[str, ...] = ()
    """What is asked, by the chat template where there is one; by default two of the validation documents."""
    generate_tokens: Annotated[int, Ge(0)] = 64
    """Length of a generation; 0: none are made."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the weights, the order of the data, and dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(VALUES, self.chat_template_kwargs)
        for share in ("validation", "test"):
            value = getattr(self, share)
            if getattr(self, f"{share}_data") is not None and value not in (0, getattr(Config, share)):
                raise ValueError(
                    f"{share}={value:g} is the share of data to hold out, and with {share}_data none is: "
                    "give one of the two"
                )
        if self.patience is not None and not self.validation and self.validation_data is None:
            raise ValueError(
                f"patience={self.patience} watches val_loss, and with validation=0 nothing is held out: give "
                "validation a share, or leave patience out"
            )
        if self.patience is not None and self.eval_every is None:
            raise ValueError(
                f"patience={self.patience} counts the evaluations while training, and with eval_every=none "
                "there are none: give eval_every a length, or leave patience out"
            )
        if self.prompts and not self.generate_tokens:
            raise ValueError(
                "prompts are given, and with generate_tokens=0 none is asked: leave out one of the two"
            )
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(f"max_steps={self.max_steps} and epochs={self.epochs} are both given: give one")
        if self.quantisation != "none" and (not self.lora.used or self.lora.dora):
            raise ValueError(
                f"quantisation={self.quantisation} is for weights that stay as they are, under LoRA: "
                + ("DoRA needs them exact" if self.lora.dora else "give a lora.rank")
            )
        if self.streaming and self.data_share < 1:
            raise ValueError(
                f"data_share={self.data_share:g} with streaming=true: which samples a stream has is known "
                "once they have come; leave out streaming=true, or train less of it by max_steps"
            )
        if self.add_tokens and self.lora.adapter is not None:
            raise ValueError(
                f"lora.adapter={self.lora.adapter} has the tokens that it was trained with, and gets no "
                "others: leave out add_tokens, or train a new adapter"
            )
        if self.train_only and self.lora.used:
            raise ValueError(
                "train_only with lora: adapters are what is trained, see lora.targets and "
                "lora.modules_to_save; leave out one of the two"
            )
        if not all(text.strip() for text in self.add_tokens):
            raise ValueError("add_tokens: a token of spaces or of nothing cannot be added")

    @property
    def named(self) -> dict[sources.Key, str]:
        """What names data, by the key that does."""
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
    """What can be seen before any process is started. Raises BadInput."""
    from stoker.data import sources
    from stoker.language import chat_template, hub, shape

    if config.chat_template is not None:
        chat_template.read(config.chat_template)
    for key, data in config.named.items():
        sources.check(data, key, config.columns)
    is_new = config.model in shape.SIZES
    model = None if is_new else hub.find(config.model, known=tuple(shape.SIZES), weights=False)
    if model is not None:
        shape.check_positions(config.model, shape.positions(model), config.sequence_length)
    if config.tokenizer is not None:
        hub.check_tokenizer(config.tokenizer)
    _check_targets(config, model)
    if config.lora.adapter is not None:
        _check_adapter(config, config.lora.adapter, model)
    if config.kernels != "torch":
        from stoker.language import kernels

        kernels.check(config.kernels)
    if config.quantisation != "none":
        from stoker.language import quantised

        quantised.check()


def _check_targets(config: Config, model: Path | None) -> None:
    """Raises BadInput. torch is loaded for it only where the model's files do not show its modules."""
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
    """Raises BadWorldSize where a model is not cut into as many stages; BadInput where into none."""
    if config.parallel == "pipeline":
        from stoker.language import shape

        virtual = config.pipeline.stages_per_rank if config.pipeline.schedule == "interleaved" else 1
        shape.check_stages(
            config.model, stages=(config.pipeline.ranks or ranks) * virtual, tied=config.tie_embeddings
        )


def _check_adapter(config: Config, adapter: str, model: Path | None) -> None:
    """As `check_launch`; the model's directory has not all of its weights yet where it is one of the hub."""
    from stoker import object_store
    from stoker.language import hub, saved_adapters

    folder = hub.find(adapter, "lora.adapter")
    saved_adapters.check(folder, model=config.model, origin=model, quantised=config.quantisation != "none")
    here = object_store.is_url(config.model) or Path(config.model).expanduser().is_dir()
    if (model is None or here) and World.current().rank == 0:
        saved_adapters.check_weights(folder, model or config.model)


def train(run: Run, config: Config) -> None:
    """Read and pack the data, build the model, train, test, export."""
    from stoker import distributed
    from stoker.data import sources, tokens
    from stoker.engine import optimizers, schedule
    from stoker.engine.precision import DTYPES
    from stoker.engine.random_state import seed_everything
    from stoker.language import (
        adapters,
        building,
        data,
        export,
        flops,
        generation,
        kernels,
        objective,
        perplexity,
    )  # fmt: skip
    from stoker.loop import Trainer, computed_in

    seed_everything(config.seed)
    distributed.join(run.world, config.backend)
    frozen = DTYPES[computed_in(run, config)] if config.lora.used else DTYPES["fp32"]
    with distributed.rank_zero_first(run.world):
        found = sources.read_all(
            config.data, validation=config.validation, test=config.test, streaming=config.streaming,
            validation_data=config.validation_data, test_data=config.test_data, columns=config.columns,
        )  # fmt: skip
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
            planned=run.world.planned > 0,
        )
        packing = config.packing and language.packs
        rows = data.pack(
            found, language.tokenizer, sequence_length=config.sequence_length, loss_on=config.loss_on,
            packing=packing, values=config.chat_template_kwargs,
        )  # fmt: skip
    data.say(run, config.named, found, rows, packed=packing, wanted=config.packing)
    language = dataclasses.replace(language, tokenizer=data.as_asked(found, language.tokenizer))
    prompts = data.prompts(
        found, language.tokenizer, config.prompts, positions=building.positions(language.config),
        values=config.chat_template_kwargs,
    )  # fmt: skip
    model = _as_trained(run, language, config)
    called = objective.attach(model)
    kernels.use(model, config.kernels)
    lr = config.lr or default_lr(config.lora.used, language.pretrained)
    needed = flops.per_token(model, context=rows.train.context, labelled=rows.train.labelled)
    with adapters.advising(config.lora, config.quantisation):
        trainer = Trainer(
            run,
            model,
            optimizer=optimizers.asked_for(config, lr=lr),
            inputs=called.inputs,
            loss=called.loss,
            schedule=schedule.build(config.schedule, warmup=config.warmup, floor=config.min_lr),
            training=config,
            load=adapters.loading(language.load),
        )
    if not run.world.planned:  # whose weights may not be here
        run.fingerprint("model", language.fingerprint)
        export.record_shape(trainer, language, model)
    run.params(**adapters.settings(model, config.lora), **({} if config.lr else {"lr": lr}))

    how: dict[str, Any] = {
        "batch_size": config.batch_size,
        "collate": functools.partial(tokens.collate, trimmed=not packing and trainer.strategy != "pipeline"),
    }

    def evaluate() -> None:
        perplexity.log_validation(trainer, rows.validation, flops=needed, **how)
        generation.log_generations(trainer, language, prompts, config.generate_tokens)
        run.table("memory", trainer.memory(), MEMORY)

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
                trainer.finish(f"val_loss got no better over {config.patience} evaluations")
    perplexity.log(trainer, "test_perplexity", rows.test, **how)
    export.export(trainer, language, model)


def _as_trained(run: Run, language: Language, config: Config) -> Any:
    """The model with its adapters, in 4 bits where these are asked for, frozen where no text goes through."""
    from stoker.language import adapters, noise, quantised, targets

    targets.freeze_what_no_text_goes_through(language.model)
    targets.train_only(language.model, config.train_only)
    if config.quantisation == "nf4":
        quantised.convert(language.model)
    model = adapters.adapted(language, config.lora, compare=run.world.rank == 0)
    noise.add(model, config.neftune)
    targets.say(run, model)
    return model


MEMORY = ("rank", "weights, GiB", "gradients", "optimizer", "activations and others", "peak")


def default_lr(lora: bool, pretrained: bool) -> float:
    """The peak learning rate where none is given."""
    if not pretrained:
        return 3e-3
    return 2e-4 if lora else 2e-5
