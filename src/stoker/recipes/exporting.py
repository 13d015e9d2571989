"""Writing what a recipe has trained as an ordinary Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from stoker.loop import Trainer

Describe = Callable[[Path], None]
"""Writes all of the directory but the weights: config, tokenizer, what prepares images."""


def export(trainer: Trainer, describe: Describe) -> Path | None:
    """Write the model under artifacts; rank 0 does, all call it."""
    tensors = trainer.state_dict()
    if trainer.world.rank > 0:
        return None
    target = _described(trainer, "model", describe)
    save_torch_state_dict(tensors, target)
    return trainer.run.artifact(target, kind="model")


def record_shape(trainer: Trainer, describe: Describe) -> None:
    """Write all of the directory that `export` will, but for the weights.

    With it a checkpoint of a run that has not ended can be exported too. Rank 0 does, in the first attempt.
    """
    if trainer.world.rank == 0 and not trainer.run.continued:
        trainer.run.artifact(_described(trainer, "shape", describe), kind="shape")


def _described(trainer: Trainer, name: str, describe: Describe) -> Path:
    target = trainer.run.directory.artifacts / name
    target.mkdir(parents=True, exist_ok=True)
    describe(target)
    return target
