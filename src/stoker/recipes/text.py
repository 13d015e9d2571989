"""Train a text classifier: a new encoder (BERT), or a loaded model; logs its accuracy and size.

Each text is tokenised once. A batch holds texts of similar length and is padded to its longest text.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from stoker.duration import Duration
from stoker.engine import keys
from stoker.engine.keys import Betas, Length, Warmup
from stoker.engine.settings import Training
from stoker.errors import BadInput, nearest
from stoker.recipes.text_shape import SIZES, Shape, shape
from stoker.user_run import Run
from stoker.words import counted

if TYPE_CHECKING:
    from stoker.data.labelled import Texts
    from stoker.data.text_rows import Rows

log = logging.getLogger("stoker")

BEST_METRIC = "val_accuracy"

PRELOAD = ("stoker.recipes.text_model", "stoker.data.labelled_sources", "stoker.data.text_rows")


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Keys of `stoker train text`."""

    model: str = "bert-tiny"
    """bert-tiny, bert-mini, bert-small, bert-medium or bert-base (to train from scratch), a directory, or a
    hub id."""
    layers: Annotated[int, Ge(1)] | None = None
    """Number of blocks of a new model, instead of its size's default."""
    width: Annotated[int, Ge(1)] | None = None
    """Hidden size of a new model, instead of its size's default."""
    heads: Annotated[int, Ge(1)] | None = None
    """Attention heads of a new model; default: one per 64 of the width, or the next smaller number that
    divides it."""
    feed_forward: Annotated[int, Ge(1)] | None = None
    """Units in the feed-forward layers of a new model; default: 4 times the width."""
    dropout: Annotated[float, Ge(0), Lt(1)] | None = None
    """Dropout of a new model; default: 0.1."""
    data: str = "python-docstrings"
    """python-docstrings (built in: which part of the library is a docstring from?), a .jsonl, .csv or
    .parquet file, a folder of these, or a hub dataset: org/name, org/name@revision, org/name#config,
    org/name#/train[:20%]."""
    text_column: str = "text"
    """Name of the field with the text."""
    label_column: str = "label"
    """Name of the field with the label, which is a text or a whole number."""
    tokenizer: str | None = None
    """A directory or hub id; default: the model's own, or for a new model one trained on the data."""
    vocab_size: Annotated[int, Ge(300)] = 4096
    """Vocabulary size of a tokenizer trained by this run."""
    max_length: Annotated[int, Ge(2)] = 128
    """Maximum tokens per text; longer texts are truncated."""
    lr: Annotated[float, Gt(0)] | None = None
    """Peak learning rate; default: 1e-3 from scratch, 5e-5 for a loaded model."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """How the learning rate decays after the warm-up."""
    warmup: Warmup = 0.1
    """Length of the learning-rate warm-up: a share of the steps, such as 0.1, or a number, such as 100."""
    min_lr: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the peak learning rate at which cosine, linear and wsd end."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """AdamW's decoupled weight decay."""
    decay_all: bool = False
    """Also apply weight decay to norms, biases and all other one-dimensional parameters."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw8bit"] = "adamw"
    """AdamW, SGD with momentum, Adafactor, or AdamW with 8-bit states (extra `quantisation`)."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of AdamW's moving averages of the gradient and of its square (also with 8-bit states)."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Term that AdamW adds to the denominator for numerical stability (also with 8-bit states)."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the target probability spread over all classes during training."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Maximum global L2 norm of the gradient; larger gradients are scaled down to it."""
    max_steps: Length | None = None
    """How long to train: 100 (steps), 2ep or 1000000tok."""
    epochs: Annotated[float, Gt(0)] | None = None
    """The same in epochs; if neither is given, 5 from scratch and 3 for a loaded model."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Texts per step, over all ranks."""
    eval_every: Length = Duration(1, "epoch")
    """How often to measure accuracy and macro F1 on the validation texts."""
    patience: Annotated[int, Ge(1)] | None = None
    """End early once val_accuracy has not improved for this many evaluations; none: never."""
    load_best: bool = False
    """Test and export the weights with the best val_accuracy, not the last ones; implies checkpoint_best."""
    validation: Annotated[float, Gt(0), Lt(0.5)] = 0.1
    """Share of the texts held out for evaluation during training, if the data has no validation split."""
    test: Annotated[float, Gt(0), Lt(0.5)] = 0.1
    """Share of the texts held out for the final test, if the data has no test split."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed for the weights, the order of the data, and dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        keys.check_length(self.max_steps, self.epochs)

    @property
    def is_new(self) -> bool:
        """Whether the model starts from scratch."""
        return self.model in SIZES

    @property
    def shape(self) -> Shape:
        """The shape of a new model. Raises BadInput."""
        return shape(
            self.model,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            feed_forward=self.feed_forward,
        )

    @property
    def length(self) -> Duration:
        """How long to train."""
        return self.max_steps or Duration(self.epochs or (5.0 if self.is_new else 3.0), "epoch")


def check_launch(config: Config) -> None:
    """Check what can be checked before any process is started. Raises BadInput."""
    from stoker.data import labelled_sources

    if config.parallel == "pipeline":
        raise BadInput("parallel=pipeline: an encoder cannot be split into stages; use parallel=ddp or fsdp")
    labelled_sources.check(config.data)
    if config.tokenizer is not None:
        from stoker.language import hub

        hub.check_tokenizer(config.tokenizer)
    if config.is_new:
        keys.warn_of_folder(config.model)
        config.shape  # noqa: B018 (raises if the shape is invalid)
        return
    own = ("layers", "width", "heads", "feed_forward", "dropout")
    given = next((name for name in own if getattr(config, name) is not None), None)
    if given is not None:
        raise BadInput(
            f"{given}={getattr(config, given)} is for new models, but {config.model} has its own: omit it, "
            f"or use one of {', '.join(SIZES)}{nearest(config.model, SIZES)}"
        )
    from stoker.recipes import text_model

    text_model.check(config.model)


def _warn(texts: Texts, rows: Rows, max_length: int) -> None:
    """Say what of the data is probably not as it was meant."""
    truncated = rows.train.truncated + rows.validation.truncated + rows.test.truncated
    count = len(texts.train) + len(texts.validation) + len(texts.test)
    if truncated:
        log.warning(
            "data: %s of %s %s cut off at %d tokens: increase max_length",
            f"{truncated:,}", counted(count, "text"), "is" if truncated == 1 else "are", max_length,
        )  # fmt: skip
    if texts.are_hardly_repeated:
        log.warning(
            "data: %d texts have %d different labels, so most labels are seen once: is label_column correct?",
            len(texts.train), len(texts.classes),
        )  # fmt: skip


def train(run: Run, config: Config) -> None:
    """Read and tokenise the texts, build the model, train, test, export."""
    from stoker import distributed
    from stoker.data import labelled_sources, text_rows
    from stoker.engine import optimizers, schedule
    from stoker.engine.random_state import seed_everything
    from stoker.language import hub
    from stoker.recipes import classifiers, exporting, resuming, text_model
    from stoker.trainer import Trainer

    seed_everything(config.seed)
    distributed.join(run.world, config.backend)
    columns = labelled_sources.Columns(config.text_column, config.label_column)
    with distributed.rank_zero_first(run.world):
        texts = labelled_sources.read(config.data, columns, validation=config.validation, test=config.test)
        made = text_model.build(
            config.model,
            texts,
            shape=config.shape if config.is_new else None,
            dropout=0.1 if config.dropout is None else config.dropout,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            max_length=config.max_length,
        )
        rows = text_rows.tokenise(
            texts, classes=made.classes, tokenizer=made.tokenizer, max_length=config.max_length,
            batch_size=config.batch_size, fingerprint=made.encoding,
        )  # fmt: skip
    resuming.check_classes(run, made.classes)
    if config.is_new:
        resuming.check_tokens(run, made.tokenizer.get_vocab())
    text_model.say(run, config.data, texts, rows, made)
    if run.world.rank == 0:
        _warn(texts, rows, config.max_length)
    hub.record(run, {"model": None if config.is_new else config.model, "tokenizer": config.tokenizer})
    mean_length = round(rows.train.tokens_per_sample)
    needed = 3 * text_model.forward_flops(made, mean_length) / mean_length  # backward is twice forward
    size = text_model.size(made, config.max_length)

    trainer = Trainer(
        run,
        made.model,
        optimizer=optimizers.asked_for(config, lr=config.lr or (1e-3 if config.is_new else 5e-5)),
        inputs=text_model.inputs,
        loss=classifiers.loss(config.label_smoothing),
        schedule=schedule.build(config.schedule, warmup=config.warmup, floor=config.min_lr),
        training=dataclasses.replace(config, checkpoint_best=True) if config.load_best else config,
        best=BEST_METRIC,
    )
    describe = functools.partial(text_model.describe, made)
    exporting.record_shape(trainer, describe)
    collate = functools.partial(text_rows.collate, pad_id=made.tokenizer.pad_token_id)

    def measure(split: str, dataset: text_rows.TextRows) -> None:
        sums = trainer.measure(dataset, text_model.metrics, batch_size=config.batch_size, collate=collate)
        found = text_model.measured(sums, made.classes)
        run.log({f"{split}_{name}": value for name, value in found.metrics.items()})
        run.table(f"{split}_by_class", found.by_class, text_model.CLASS_COLUMNS)

    if trainer.steps_done == 0:
        run.log(size)
    loader = trainer.loader(rows.train, batch_size=config.batch_size, collate=collate)
    for batch in trainer.steps(loader, max_steps=config.length):
        run.log(loss=trainer.step(batch), **trainer.step_metrics())
        if trainer.every(10) or trainer.last:
            run.log(trainer.performance(needed))
        if trainer.every(config.eval_every) or trainer.last:
            measure("val", rows.validation)
            if config.patience is not None and trainer.stale(BEST_METRIC, config.patience):
                trainer.finish(f"{BEST_METRIC} did not improve for {config.patience} evaluations")
    if config.load_best:
        trainer.load_best()
    measure("test", rows.test)
    exporting.export(trainer, describe)
