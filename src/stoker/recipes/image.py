"""Train an image classifier: a new ResNet (He et al. 2016, arXiv:1512.03385), or a loaded model.

Decoding and augmentation run in workers and depend only on (seed, epoch, sample).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from stoker.duration import Duration
from stoker.engine import keys
from stoker.engine.keys import Betas, Length, Warmup
from stoker.engine.settings import Training
from stoker.errors import BadInput
from stoker.recipes.image_shape import SIZES
from stoker.user_run import Run

log = logging.getLogger("stoker")

PRELOAD = (
    "stoker.recipes.image_model", "stoker.data.images", "stoker.data.augment",
    "sklearn.datasets",  # holds the digits; importing it takes longer than training an epoch on them
)  # fmt: skip

BEST_METRIC = "val_accuracy"


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Keys of `stoker train image`."""

    model: str = "resnet-tiny"
    """resnet-tiny, resnet-18, resnet-34, resnet-50, resnet-101, a local directory, or a hub id."""
    data: str = "digits"
    """digits (built in), a folder with one subfolder per class, a .parquet or .tar file, or a folder of
    these."""
    image_column: str = "image"
    """Name of the column with the image in Parquet files."""
    label_column: str = "label"
    """Name of the column with the label in Parquet files, or of the field in the JSON of tar shards."""
    image_size: Annotated[int, Ge(8)] | None = None
    """Pixels per side; default: what a loaded model was trained on; for a new one 32 for digits, else 224."""
    flip: bool = True
    """Flip half of the training images horizontally; never applied to digits."""
    workers: Annotated[int, Ge(0)] = 2
    """Processes per rank that read, decode and augment; any number gives the same batches."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw8bit"] = "sgd"
    """SGD with Nesterov momentum, AdamW, Adafactor, or AdamW with 8-bit states."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of AdamW's moving averages of the gradient and of its square (also with 8-bit states)."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Term that AdamW adds to the denominator for numerical stability (also with 8-bit states)."""
    lr: Annotated[float, Gt(0)] = 0.1
    """Peak learning rate."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    """L2 penalty for SGD; decoupled weight decay for AdamW."""
    decay_all: bool = False
    """Also apply weight decay to norms, biases and all other one-dimensional parameters."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the target probability spread over all classes during training."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """How the learning rate decays after the warm-up."""
    warmup: Warmup = 0.05
    """Length of the learning-rate warm-up: a share of the steps, such as 0.05, or a number, such as 100."""
    min_lr: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the peak learning rate at which cosine, linear and wsd end."""
    max_steps: Length | None = None
    """How long to train: 100 (steps) or 2ep."""
    epochs: Annotated[float, Gt(0)] | None = None
    """The same in epochs; 10 if neither is given."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Images per step, over all ranks."""
    eval_every: Length = Duration(1, "epoch")
    """How often to measure accuracy on the validation images."""
    patience: Annotated[int, Ge(1)] | None = None
    """End early once val_accuracy has not improved for this many evaluations; none: never."""
    load_best: bool = False
    """Test and export the weights with the best val_accuracy, not the last ones; implies checkpoint_best."""
    validation: Annotated[float, Gt(0), Lt(0.5)] = 0.1
    """Share of the images held out for evaluation during training, if the data has no validation split."""
    test: Annotated[float, Gt(0), Lt(0.5)] = 0.1
    """Share of the images held out for the final test, if the data has no test split."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed for the weights, the splits, the order of the data, and augmentation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        keys.check_length(self.max_steps, self.epochs)

    @property
    def length(self) -> Duration:
        """How long to train."""
        return self.max_steps or Duration(self.epochs or 10.0, "epoch")


def check_launch(config: Config) -> None:
    """Check what can be checked before any process is started. Raises BadInput."""
    if config.parallel == "pipeline":
        raise BadInput(
            "parallel=pipeline: a ResNet cannot be split into stages, its blocks differ too much in size; "
            "use parallel=ddp or fsdp"
        )
    if config.model in SIZES:
        keys.warn_of_folder(config.model)
    else:
        from stoker.language import hub

        hub.find(config.model, known=tuple(SIZES), weights=False)


def train(run: Run, config: Config) -> None:
    """Find the images, build the model, train, test, export."""
    from stoker import distributed
    from stoker.data import augment, image_source, images
    from stoker.engine import optimizers, schedule
    from stoker.engine.random_state import seed_everything
    from stoker.language import hub
    from stoker.recipes import classifiers, exporting, image_model, image_processor, resuming
    from stoker.trainer import Trainer

    seed_everything(config.seed)
    distributed.join(run.world, config.backend)
    columns = image_source.Columns(config.image_column, config.label_column)
    with distributed.rank_zero_first(run.world):  # which copies Parquet files into the cache
        source = images.read(config.data, columns)
    splits = images.split(source, validation=config.validation, test=config.test, seed=config.seed)
    small = config.data == "digits"
    made = image_model.build(
        config.model, classes=source.classes, size=config.image_size,
        new=image_processor.DIGITS if small else image_processor.PHOTOS,
    )  # fmt: skip
    source = image_model.in_order(source, made.classes)
    classifiers.say(run, made.said)
    size, mean, std = made.processor.size, made.processor.mean, made.processor.std
    evaluated = augment.Evaluate(size, mean, std)
    training = images.Images(
        source, splits.train, augment.Augment(size, mean, std, flip=config.flip and not small)
    )
    validation = images.Images(source, splits.validation, evaluated)
    test = images.Images(source, splits.test, evaluated)
    resuming.check_classes(run, source.classes)
    run.fingerprint("data", source.fingerprint)
    if run.world.rank == 0:
        log.info("data: %s, %s", config.data, images.describe(source, splits))
    run.data("data", config.data, fingerprint=f"sha256:{source.fingerprint}" if small else "")
    run.attempt.event(
        "data", sources=[config.data], images={name: len(those) for name, those in vars(splits).items()}
    )
    hub.record(run, {"model": None if config.model in SIZES else config.model})

    trainer = Trainer(
        run,
        made.model,
        optimizer=optimizers.asked_for(config, lr=config.lr, momentum=config.momentum),
        inputs=image_model.inputs,
        loss=classifiers.loss(config.label_smoothing),
        schedule=schedule.build(config.schedule, warmup=config.warmup, floor=config.min_lr),
        training=dataclasses.replace(config, checkpoint_best=True) if config.load_best else config,
        best=BEST_METRIC,
    )

    describe = functools.partial(image_model.describe, made)
    exporting.record_shape(trainer, describe)

    def measure(dataset: Any) -> dict[str, float]:
        return trainer.measure(dataset, image_model.metrics, batch_size=config.batch_size)

    loader = trainer.loader(training, batch_size=config.batch_size, workers=config.workers)
    for batch in trainer.steps(loader, max_steps=config.length):
        run.log(loss=trainer.step(batch), **trainer.step_metrics())
        if trainer.every(10) or trainer.last:
            run.log(trainer.performance())
        if trainer.every(config.eval_every) or trainer.last:
            run.log({f"val_{name}": value for name, value in measure(validation).items()})
            if config.patience is not None and trainer.stale(BEST_METRIC, config.patience):
                trainer.finish(f"{BEST_METRIC} did not improve for {config.patience} evaluations")
    if config.load_best:
        trainer.load_best()
    run.log({f"test_{name}": value for name, value in measure(test).items()})
    exporting.export(trainer, describe)
