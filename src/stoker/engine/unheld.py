"""A warning of parameters that get gradients, but that no optimizer has."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from stoker import words
from stoker.engine.step import parameters_of
from stoker.engine.trained import Trained
from torch import nn

log = logging.getLogger("stoker")

_NAMED = 5  # names in a message


class Unheld:
    """Looks for them in the first step of a loop, and in that with which parameters are unfrozen.

    A parameter that the loss does not depend on is not meant to be trained, and not warned of.

    Args:
        optimizers: those of the Trainer.
        looks: whether this rank does.
    """

    def __init__(
        self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], *, looks: bool = True
    ) -> None:
        self._looks = looks
        self._named = list(model.named_parameters())
        self._trained = Trained(model)
        self._optimizers = list(optimizers)
        self._said: set[str] = set()
        self._looks_at: int | None = None
        self._begins = True

    def begin(self) -> None:
        """Begin a loop."""
        self._begins = True

    def know(self, others: Iterable[object]) -> None:
        """Take account of a script's own optimizers among these objects."""
        self._optimizers += [o for o in others if isinstance(o, torch.optim.Optimizer)]

    def look(self, step: int) -> None:
        """Warn of them, with the gradients of a step; each is named once."""
        if self._trained.changed() or self._begins:
            self._looks_at, self._begins = step, False
        if not self._looks or self._looks_at != step:  # a step can have several updates
            return
        held = {id(p) for p in parameters_of(self._optimizers)}
        found = [n for n, p in self._named if p.requires_grad and p.grad is not None and id(p) not in held]
        new = [name for name in found if name not in self._said]
        self._said.update(new)
        if new:
            log.warning(
                "no optimizer of the Trainer has %s, which get gradients: let optimizer= take them too, "
                "frozen or not (lambda _: AdamW(model.parameters())); or in the step that unfreezes them, "
                'optimizer.add_param_group({"params": ..., "lr": ...}). Freeze what is not to be trained '
                "with requires_grad_(False); register an optimizer of your own for checkpointing",
                words.some(new, _NAMED),
            )  # fmt: skip
