"""Exporting a recipe's trained model as an ordinary Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from stoker import exports, storage
from stoker.run import artifacts
from stoker.trainer import Trainer
from stoker.user_run import Run

Describe = Callable[[Path], None]
"""Writes everything in the directory except the weights: config, tokenizer, image preprocessing."""


def export(trainer: Trainer, describe: Describe) -> Path | None:
    """Write the model under artifacts. All ranks must call it; rank 0 writes."""
    tensors = trainer.state_dict()
    if trainer.world.rank > 0:
        return None
    target = _described(trainer, "model", describe)
    save_torch_state_dict(tensors, target)
    storage.permit_as_folder(target)
    return trainer.run.artifact(target, kind="model")


def record_shape(trainer: Trainer, describe: Describe) -> None:
    """Write everything that an export of the model contains, except the weights.

    This lets a checkpoint of an unfinished run be exported too. Rank 0 writes it, in the first attempt that
    comes this far, and again if it is not here as it was recorded, as on another machine.
    """
    if trainer.world.rank == 0 and not _is_recorded(trainer.run, exports.SHAPE):
        artifacts.remove(trainer.run.directory.artifacts / exports.SHAPE)  # a kill may have left a part
        trainer.run.artifact(_described(trainer, exports.SHAPE, describe), kind=exports.SHAPE)


def _is_recorded(run: Run, name: str) -> bool:
    """Whether an artifact's folder is as it was recorded."""
    known, folder = run.attempt.recorded.get(name), run.directory.artifacts / name
    if known is None or not folder.is_dir():
        return False
    return artifacts.describe(run.directory, folder) == known.get("files")


def _described(trainer: Trainer, name: str, describe: Describe) -> Path:
    target = trainer.run.directory.artifacts / name
    target.mkdir(parents=True, exist_ok=True)
    describe(target)
    return target
