"""How well a model predicts held-out tokens: the mean loss over all of them, and per source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stoker.data.tokens import PackedDataset
from stoker.engine.metrics import perplexity
from stoker.trainer import Trainer


def log(trainer: Trainer, name: str, parts: Mapping[str, PackedDataset], **how: Any) -> None:
    """Log the perplexity over all tokens of all parts, if there are any; see `losses`."""
    if parts:
        trainer.run.log({name: perplexity(mean(losses(trainer, parts, **how), parts))})


def log_test(trainer: Trainer, parts: Mapping[str, PackedDataset], **how: Any) -> None:
    """Log the loss and the perplexity of all tokens, and those of each part if there are several."""
    found = losses(trainer, parts, **how)
    loss = mean(found, parts)
    trainer.run.log(test_loss=loss, test_perplexity=perplexity(loss))
    if len(found) > 1:
        trainer.run.log({f"test_loss/{name}": value for name, value in found.items()})
        trainer.run.log({f"test_perplexity/{name}": perplexity(value) for name, value in found.items()})


def losses(trainer: Trainer, parts: Mapping[str, PackedDataset], **how: Any) -> dict[str, float]:
    """The mean loss over the tokens of each part, in nats, exact over ranks. All ranks make the same call.

    Args:
        how: see `Trainer.evaluate`.
    """
    return {name: trainer.evaluate(part, **how) for name, part in parts.items()}


def mean(losses: Mapping[str, float], parts: Mapping[str, PackedDataset]) -> float:
    """The mean loss over all tokens of all parts."""
    tokens = sum(part.loss_tokens for part in parts.values())
    return math.fsum(losses[name] * part.loss_tokens for name, part in parts.items()) / tokens


def log_validation(trainer: Trainer, parts: Mapping[str, PackedDataset], *, flops: float, **how: Any) -> None:
    """Log and print an evaluation over all parts, and the loss of each if there are several.

    Without any parts, only the loop's progress is printed.

    Args:
        flops: see `Trainer.performance`.
        how: see `Trainer.evaluate`.
    """
    if not parts:
        trainer.say(flops)
        return
    found = losses(trainer, parts, **how)
    loss = mean(found, parts)
    of_each = {f"val_loss/{name}": value for name, value in found.items()} if len(found) > 1 else {}
    trainer.run.log({"val_loss": loss, "val_perplexity": perplexity(loss), **of_each})
    trainer.say(flops, val_perplexity=perplexity(loss))
