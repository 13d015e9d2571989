"""Watching a model: norms and histograms of its gradients and parameters, every n steps.

A hook in front of every optimizer's step reads the gradients when they are complete,
whoever wrote the loop. Everything is computed on the device and never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

Values = Mapping[str, torch.Tensor]


class Watch:
    """Watches a model until `close`.

    Args:
        model: every parameter that trains is watched, under its name.
        every: optimizer steps from one look to the next; the first step is looked at.
        bins: of each histogram; 0 for none.
        take: is given the norms (scalar tensors by name: `gradients/NAME`, `parameters/NAME`,
            and `gradient_norm` over all) and the histograms (name -> lowest, highest, counts).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        every: int,
        bins: int,
        take: Callable[[Values, Mapping[str, tuple[torch.Tensor, ...]]], None],
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: watch a model every 1 step or more")
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._every = every
        self._bins = bins
        self._take = take
        self._steps: dict[int, int] = {}  # of each optimizer, by its id
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Stop watching."""
        self._hook.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        owned = [p for group in optimizer.param_groups for p in group["params"] if p in self._names]
        if not owned:
            return
        step = self._steps.get(id(optimizer), 0)
        self._steps[id(optimizer)] = step + 1
        if step % self._every == 0:
            self._take(self._norms(owned), self._histograms(owned) if self._bins else {})

    def _norms(self, parameters: list[torch.nn.Parameter]) -> Values:
        with_gradient = [p for p in parameters if p.grad is not None]
        gradients = [_whole(p.grad) for p in with_gradient if p.grad is not None]
        found = {}
        if gradients:
            norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
            found = {f"gradients/{self._names[p]}": n for p, n in zip(with_gradient, norms, strict=True)}
            found["gradient_norm"] = torch.linalg.vector_norm(
                torch.stack([n.to(norms[0].device) for n in norms])
            )
        for p in parameters:
            norm = torch.linalg.vector_norm(_whole(p.detach()), dtype=torch.float32)
            found[f"parameters/{self._names[p]}"] = norm
        return found

    def _histograms(self, parameters: list[torch.nn.Parameter]) -> Mapping[str, tuple[torch.Tensor, ...]]:
        found: dict[str, tuple[torch.Tensor, ...]] = {}
        for p in parameters:
            found[f"parameters/{self._names[p]}"] = histogram(_whole(p.detach()), self._bins)
            if p.grad is not None:
                found[f"gradients/{self._names[p]}"] = histogram(_whole(p.grad), self._bins)
        return found


def histogram(values: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lowest and highest finite value (scalars) and counts of `bins` equal parts between, on the device.

    `torch.histc` would wait for the device to learn the range.
    """
    flat = (torch.view_as_real(values) if values.is_complex() else values).flatten().float()
    finite = flat.isfinite()
    low = torch.where(finite, flat, torch.inf).amin()
    high = torch.where(finite, flat, -torch.inf).amax()
    width = torch.where(high > low, high - low, torch.ones_like(high))
    place = ((torch.where(finite, flat, low) - low) / width * bins).nan_to_num().long().clamp(0, bins - 1)
    counts = torch.zeros(bins, dtype=torch.float64, device=flat.device)
    counts.scatter_add_(0, place, finite.double())
    return low, high, counts


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is sharded over ranks; all of them ask for it together."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor
