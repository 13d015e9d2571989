"""Warnings of parameters that no optimizer has, and of optimizers that no checkpoint has."""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from stoker import words
from stoker.engine.step import parameters_of
from stoker.engine.trained import Trained
from stoker.errors import StokerError
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

log = logging.getLogger("stoker")

_NAMED = 5  # names in a message


class Unheld:
    """Looks for both while a loop trains.

    For parameters it does so in the first step of a loop, and in that with which some are unfrozen. One that
    the loss does not depend on is not meant to be trained, and not warned of. An optimizer of the script is
    looked at when it steps, and needs no checkpoint while it has no state.

    Args:
        optimizers: those of the Trainer.
        looks: whether this rank does.
        changes: what a step of one of them lacks that is not made by the Trainer.
        adding_up: whether there are gradients of sums, which an update divides.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        *,
        looks: bool = True,
        changes: Sequence[str] = (),
        adding_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._looks = looks
        self._named = list(model.named_parameters())
        self._trained = Trained(model)
        self._own = list(optimizers)
        self._optimizers = list(self._own)
        self._said: set[str] = set()
        self._looks_at: int | None = None
        self._begins = True
        self._watching: Any = None
        self._changes, self._adding_up = list(changes), adding_up
        self._is_updating = False
        self._known: set[int] = set()

    def begin(self) -> None:
        """Begin a loop."""
        self._begins = True
        if self._looks and self._watching is None:
            one = weakref.ref(self)
            self._watching = register_optimizer_step_pre_hook(lambda o, *_: _see(one(), o))
            weakref.finalize(self, self._watching.remove)

    def know(self, others: Iterable[object]) -> None:
        """Take account of a script's own optimizers among these objects."""
        self._optimizers += [o for o in others if isinstance(o, torch.optim.Optimizer)]

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """In this block the Trainer steps its optimizers."""
        self._is_updating = True
        try:
            yield
        finally:
            self._is_updating = False

    def see(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at an optimizer that is about to step.

        Warns, once, of one whose state is in no checkpoint, and of one of the Trainer's that is stepped
        without it with gradients of sums. Raises StokerError if that would leave out what was asked for.
        """
        if self._is_updating:
            return
        is_own = any(optimizer is one for one in self._own)
        if is_own and self._changes:
            raise StokerError(
                f"optimizer.step() leaves out {', '.join(self._changes)}, which trainer.update does: call "
                "trainer.backward(loss_sum, weight) and trainer.update() instead"
            )
        if is_own and self._adding_up() and id(optimizer) not in self._known:
            self._known.add(id(optimizer))
            log.warning(
                "optimizer.step() takes the gradients of trainer.backward as they are, those of a sum: "
                "trainer.update() divides them by the weight, over all ranks"
            )
        if not optimizer.state or id(optimizer) in self._known:
            return
        self._known.add(id(optimizer))
        ours = [*self._optimizers, *itertools.chain.from_iterable(map(_within, self._optimizers))]
        if any(optimizer is one for one in ours):
            return
        held = {id(p) for _, p in self._named}
        if any(id(p) in held for p in parameters_of([optimizer])):
            log.warning(
                "a %s that is none of the Trainer's trains parameters of its model: no checkpoint has its "
                "state, so a resumed run would train otherwise; before the loop, add "
                "trainer.register_for_checkpointing(optimizer=optimizer)",
                type(optimizer).__name__,
            )

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


def _see(one: Unheld | None, optimizer: torch.optim.Optimizer) -> None:
    if one is not None:
        one.see(optimizer)


def _within(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that one has in its attributes, such as that of sharpness-aware minimisation."""
    return [held for held in vars(optimizer).values() if isinstance(held, torch.optim.Optimizer)]
