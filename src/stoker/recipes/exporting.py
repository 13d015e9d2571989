"""Exporting a recipe's trained model as an ordinary Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from stoker.loop import Trainer

Describe = Callable[[Path], None]
"""Writes everything in the directory except the weights: config, tokenizer, image preprocessing."""


def export(trainer: Trainer, describe: Describe) -> Path | None:
    """Write the model under artifacts. All ranks must call it; rank 0 writes."""
    tensors = trainer.state_dict()
    if trainer.world.rank > 0:
        return None
    target = _described(trainer, "model", describe)
    save_torch_state_dict(tensors, target)
    return trainer.run.artifact(target, kind="model")


def record_shape(trainer: Trainer, describe: Describe) -> None:
    """Write everything that `export` will write, except the weights.

    This lets a checkpoint of an unfinished run be exported too. Rank 0 writes it, in the first attempt.
    """
    if trainer.world.rank == 0 and not trainer.run.continued:
        trainer.run.artifact(_described(trainer, "shape", describe), kind="shape")


def _described(trainer: Trainer, name: str, describe: Describe) -> Path:
    target = trainer.run.directory.artifacts / name
    target.mkdir(parents=True, exist_ok=True)
    describe(target)
    return target
