"""Watches a model: norms and histograms of its gradients and parameters, every n steps.

A hook before every optimizer's step reads the gradients when they are complete, regardless of who wrote the
loop. Everything is computed on the device, and never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from stoker.tensors import real, whole
from torch.optim.optimizer import register_optimizer_step_pre_hook

Values = Mapping[str, torch.Tensor]


class Watch:
    """Watches a model until `close`.

    Args:
        model: every trainable parameter is watched, under its name.
        every: interval in optimizer steps; starts with the first step.
        begun: returns how many steps the run had made before this process's first one. Counting goes on from
            there, so a resumed run watches the steps that an uninterrupted one does.
        bins: bins per histogram; 0 for none.
        take: called for each optimizer with its norms (scalar tensors by name: `gradients/NAME`,
            `parameters/NAME`, and `gradient_norm` over everything, including other optimizers that have
            stepped since this one did) and histograms (name -> lowest, highest, counts).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        every: int,
        bins: int,
        begun: Callable[[], int],
        take: Callable[[Values, Mapping[str, tuple[torch.Tensor, ...]]], None],
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1 step")
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._every = every
        self._bins = bins
        self._begun = begun
        self._take = take
        self._steps: dict[int, int] = {}  # per optimizer, by its id
        self._of_step: dict[int, list[torch.Tensor]] = {}  # norms of gradients, per optimizer
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Stop watching."""
        self._hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        owned = [p for group in optimizer.param_groups for p in group["params"] if p in self._names]
        if not owned:
            return
        step = self._steps.get(id(optimizer))
        if step is None:
            step = self._begun()  # only now, because a Trainer may resume after the watch has begun
        self._steps[id(optimizer)] = step + 1
        if step % self._every == 0:
            if id(optimizer) in self._of_step:  # the first of the next step
                self._of_step.clear()
            gradients = {f"gradients/{self._names[p]}": _norm(p.grad) for p in owned if p.grad is not None}
            self._of_step[id(optimizer)] = list(gradients.values())
            parameters = {f"parameters/{self._names[p]}": _norm(p.detach()) for p in owned}
            histograms = self._histograms(owned) if self._bins else {}
            self._take({**gradients, **self._over_all(), **parameters}, histograms)

    def _over_all(self) -> Values:
        norms = [norm for of_optimizer in self._of_step.values() for norm in of_optimizer]
        if not norms:
            return {}
        on_one_device = torch.stack([norm.to(norms[0].device) for norm in norms])
        return {"gradient_norm": torch.linalg.vector_norm(on_one_device)}

    def _histograms(self, parameters: list[torch.nn.Parameter]) -> Mapping[str, tuple[torch.Tensor, ...]]:
        found: dict[str, tuple[torch.Tensor, ...]] = {}
        for p in parameters:
            found[f"parameters/{self._names[p]}"] = histogram(whole(p.detach()), self._bins)
            if p.grad is not None:
                found[f"gradients/{self._names[p]}"] = histogram(whole(p.grad), self._bins)
        return found


def histogram(values: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lowest and highest finite value (scalars) and the counts of `bins` equal bins, on the device.

    `torch.histc` would wait for the device to determine the range.
    """
    flat = real(values).flatten().float()
    finite = flat.isfinite()
    low = torch.where(finite, flat, torch.inf).amin()
    high = torch.where(finite, flat, -torch.inf).amax()
    width = torch.where(high > low, high - low, torch.ones_like(high))
    place = ((torch.where(finite, flat, low) - low) / width * bins).nan_to_num().long().clamp(0, bins - 1)
    counts = torch.zeros(bins, dtype=torch.float64, device=flat.device)
    counts.scatter_add_(0, place, finite.double())
    return low, high, counts


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(whole(tensor), dtype=torch.float32)
    return norm
