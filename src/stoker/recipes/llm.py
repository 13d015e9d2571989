"""Train a causal language model: from scratch, or fine-tuned whole or with LoRA.

Text is packed into rows of `sequence_length` tokens without attention across documents, and
the loss is the mean over the tokens of the whole global batch. Heavy imports stand inside
`train`, so that a mistyped key is answered at once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from stoker.attempt import Run
from stoker.duration import Duration
from stoker.engine.options import Training

PRELOAD = ("stoker.recipes.language_model", "stoker.recipes.language_data", "peft")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), by peft."""

    rank: Annotated[int, Ge(0)] = 0
    """Rank of the adapters; 0 trains every weight."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """The adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of an adapter's inputs dropped while training."""
    targets: str = "all-linear"
    """Modules that get an adapter: all-linear, or names joined by commas."""


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Keys of `stoker train llm`."""

    model: str = "tiny"
    """A size to start from scratch (tiny, small, base), a local directory, or a hub id."""
    data: str = "python-docs"
    """python-docs or python-docs-qa (built in), a .jsonl, .parquet or .txt file, or a hub dataset id."""
    tokenizer: str | None = None
    """A directory or hub id; by default the model's own, and for a new model one trained on the data."""
    vocab_size: Annotated[int, Ge(300)] = 4096
    """Entries of a tokenizer that is trained here."""
    tie_embeddings: bool = True
    """Of a new model: one matrix embeds tokens and predicts them. A pipeline needs false."""
    lora: Lora = field(default_factory=Lora)
    lr: Annotated[float, Gt(0)] | None = None
    """Peak learning rate; by default 3e-3 from scratch, 2e-4 with LoRA, 2e-5 for every weight."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """How the learning rate goes down after the warm-up."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of the steps over which the learning rate goes up."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """AdamW's decoupled weight decay."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw8bit"] = "adamw"
    """AdamW, SGD with momentum, Adafactor, or AdamW with 8-bit states (extra `quantisation`)."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Largest global L2 norm of the gradient; larger ones are scaled down to it."""
    max_steps: Duration | None = None
    """How long to train: 100 (steps), 2ep or 1000000tok."""
    epochs: Annotated[float, Gt(0)] | None = None
    """The same in epochs; 1 where neither is given."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Rows of a step, over all ranks."""
    sequence_length: Annotated[int, Ge(2)] = 256
    """Tokens of a row."""
    eval_every: Duration = Duration(1, "epoch")
    """Perplexity on the validation documents, and generations."""
    patience: Annotated[int, Ge(1)] | None = None
    """End early once val_loss got no better over so many evaluations; none: never."""
    validation: Annotated[float, Gt(0), Lt(0.5)] = 0.05
    """Share of the documents held out for evaluation while training."""
    test: Annotated[float, Gt(0), Lt(0.5)] = 0.05
    """Share of the documents held out for the final test."""
    prompts: tuple[str, ...] = ()
    """What generations begin with; by default two beginnings of validation documents."""
    generate_tokens: Annotated[int, Ge(1)] = 64
    """Length of a generation."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the weights, the order of the data, and dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(f"max_steps={self.max_steps} and epochs={self.epochs} are both given: give one")
        for name in ("max_steps", "eval_every"):
            value = getattr(self, name)
            if value is not None and value.seconds is not None:
                raise ValueError(
                    f"{name}={value} is by the clock, which differs between machines: "
                    "count in steps, ep or tok"
                )

    @property
    def length(self) -> Duration:
        """How long to train."""
        return self.max_steps or Duration(self.epochs or 1.0, "epoch")


def check_launch(config: Config, ranks: int) -> None:
    """What can be seen before any process is started. Raises BadInput."""
    from stoker.recipes import language_shape

    if config.parallel == "pipeline":
        virtual = config.pipeline.stages_per_rank if config.pipeline.schedule == "interleaved" else 1
        language_shape.check_stages(
            config.model, stages=(config.pipeline.ranks or ranks) * virtual, tied=config.tie_embeddings
        )


def train(run: Run, config: Config) -> None:
    """Read and pack the data, build the model, train, test, export."""
    from stoker import distributed
    from stoker.data import sources
    from stoker.engine import optimizers, schedule
    from stoker.engine.random_state import seed_everything
    from stoker.loop import Trainer
    from stoker.recipes import language_data, language_model

    seed_everything(config.seed)
    distributed.join(run.world, config.backend)
    with distributed.rank_zero_first(run.world):
        corpus = sources.read(config.data)
        splits = sources.split(corpus.documents, validation=config.validation, test=config.test)
        language = language_model.build(
            config.model,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            sequence_length=config.sequence_length,
            documents=splits.train,
            tie_embeddings=config.tie_embeddings,
        )
        data = language_data.pack(splits, language.tokenizer, sequence_length=config.sequence_length)
    prompts = config.prompts or language_data.prompts(splits.validation)
    lr = config.lr or default_lr(config.lora.rank, language.pretrained)
    run.fingerprint("data", corpus.fingerprint)
    run.fingerprint("model", language.fingerprint)

    trainer = Trainer(
        run,
        language_model.with_lora(language.model, **dataclasses.asdict(config.lora)),
        optimizer=optimizers.factory(
            config.optimizer, lr=lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
        ),
        inputs=language_model.inputs,
        loss=language_model.loss,
        schedule=schedule.build(config.schedule, warmup=config.warmup, floor=0.1),
        training=config,
    )

    language_model.record_shape(trainer, language)

    def loss_on(rows: Any) -> float:
        return trainer.evaluate(rows, batch_size=config.batch_size)

    def evaluate() -> None:
        val_loss = loss_on(data.validation)
        run.log(val_loss=val_loss, val_perplexity=perplexity(val_loss))
        language_model.log_generations(trainer, language.tokenizer, prompts, config.generate_tokens)

    if trainer.steps_done == 0 and language.pretrained:
        run.log(base_test_perplexity=perplexity(loss_on(data.test)))
        evaluate()
    loader = trainer.loader(data.train, batch_size=config.batch_size)
    for batch in trainer.steps(loader, max_steps=config.length):
        run.log(loss=trainer.step(batch), lr=trainer.lr)
        if trainer.every(10) and trainer.rate is not None:
            run.log(tokens_per_second=trainer.rate)
        if trainer.every(config.eval_every) or trainer.last:
            evaluate()
            if config.patience is not None and trainer.stale("val_loss", config.patience):
                trainer.finish(f"val_loss got no better over {config.patience} evaluations")
    run.log(test_perplexity=perplexity(loss_on(data.test)))
    language_model.export(trainer, language)


def default_lr(lora_rank: int, pretrained: bool) -> float:
    """The peak learning rate where none is given."""
    if not pretrained:
        return 3e-3
    return 2e-4 if lora_rank else 2e-5


def perplexity(loss: float) -> float:
    """The perplexity of a mean loss in nats a token; infinite where it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
