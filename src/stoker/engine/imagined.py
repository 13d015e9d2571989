"""Simulated steps of ranks that do not exist: tensors without values, of which only the memory is tracked.

The model and its batches are torch's fake tensors, and the ranks are a process group that transfers
nothing. A step runs through every operation of the model, the loss, the strategy and the optimizer. Code
that asks for values gets the answer that takes the most memory: every mask is true, and every number is
one, and finite.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stoker import storage
from stoker.engine import batches, gradients
from stoker.engine.allocations import Allocations, Key
from stoker.engine.ema import Ema
from stoker.engine.settings import Training
from stoker.engine.step import Load, Step
from stoker.run.directory import RunDirectory
from stoker.tensors import like, local
from stoker.world import World
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

STEPS = 2
"""Number of simulated steps: the second holds everything that the first creates, such as optimizer state."""

PARTS = (1, 2)
"""Number of micro-batches of each step: the second one of the second step runs next to gradients and all
else, and more would not take more memory."""

FILE = "plan.json"
"""File among a run's logs with the `Imagination.result` and what it applies to."""

KINDS = ("weights", "gradients", "optimizer", "gathered", "activations")
"""What memory is used for. Activations are the rest: saved by the forward pass, temporaries, the batch."""

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""Raised if values are asked for and no answer takes the most memory."""

_aten = torch.ops.aten


def remember(run: RunDirectory, ranks: int, peak: int) -> None:
    """Remember the peak in bytes for runs with the same recipe and config."""
    storage.remember(_memory(), _about(run, ranks), peak)


def remembered(run: RunDirectory, ranks: int) -> int | None:
    """The peak that a plan found for a run's recipe and config on this many ranks; None if there is none."""
    found: int | None = storage.remembered(_memory(), _about(run, ranks))
    return found


def _memory() -> Path:
    return storage.cache_folder() / "plans.json"


def _about(run: RunDirectory, ranks: int) -> dict[str, Any]:
    record = run.record()
    return {"recipe": record["recipe"], "config": record["config"], "ranks": ranks}


class Unknown(dict[str, float]):
    """Measurements of tensors without values: NaN for any name."""

    def __missing__(self, name: str) -> float:
        return math.nan


class Reality:
    """What an `Imagination` is to ranks that exist: their steps are what they are."""

    is_real = True
    """Whether tensors have values, and steps have effects."""

    def holds(self, step: Step, ema: Ema | None, training: Training, strategy: str) -> None:
        """Nothing is tracked."""

    def end(self, end: int) -> int:
        """The step with which a loop ends, from the one that its length says."""
        return end

    def batch(self, given: Any) -> Any:
        """The batch itself."""
        return given

    def step(self) -> contextlib.AbstractContextManager[None]:
        """The context of a step."""
        return contextlib.nullcontext()

    def parts(self, parts: Iterator[Any], step: int) -> Iterator[Any]:
        """Those micro-batches of a batch that are computed."""
        return parts

    def result_after(self, step: int) -> dict[str, Any] | None:
        """What was found out, if all steps were made that it takes."""
        return None


def of(world: World, model: nn.Module, load: Load) -> tuple[Reality | Imagination, nn.Module, Load]:
    """For imaginary ranks: the Imagination, the model on the meta device, and a function that fills it."""
    if not world.planned:
        return Reality(), model, load
    made = Imagination()
    _replace(model, "", lambda tensor: tensor if tensor.is_meta else tensor.to("meta"))
    return made, model, made.load


def _replace(model: nn.Module, prefix: str, made: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace parameters and buffers below a dotted prefix; shared ones stay shared."""
    # The old one is kept too, so that its id is not reused.
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        held = (module._parameters, module._buffers) if f"{name}.".startswith(prefix) else ()
        for tensors in held:
            for key, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in known:
                    new = made(old)
                    is_parameter = isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter)
                    known[id(old)] = old, nn.Parameter(new, old.requires_grad) if is_parameter else new
                tensors[key] = known[id(old)][1]


class Imagination:
    """Simulates tensors without values and tracks the memory that they would take. See also `Reality`."""

    is_real = False

    def __init__(self) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._allocations = _WithoutValues(self._moment)
        self._updating = False
        self._optimizers: dict[int, Optimizer] = {}
        self._model, self._held = nn.Module(), list[torch.Tensor]()
        self._weights: set[Key] = set()
        self._gradients: set[Key] = set()
        self._buckets: list[torch.Tensor] = []
        self._is_pipeline = self._is_offloaded = False

    def load(self, model: nn.Module, device: torch.device, prefix: str) -> None:
        """Allocate what is on the meta device of a model, below a dotted prefix, on a device."""
        with self._fake:
            _replace(
                model, prefix, lambda tensor: _there(tensor, device) if local(tensor).is_meta else tensor
            )

    def holds(self, step: Step, ema: Ema | None, training: Training, strategy: str) -> None:
        """Track the weights of a step, their averages, and DDP's gradient buckets."""
        self._held = [*(ema.values.values() if ema is not None else ())]
        self._model = step.model
        self._is_pipeline = strategy == "pipeline"
        self._is_offloaded = strategy == "fsdp" and training.fsdp.offload
        self._follow_weights()
        if strategy == "ddp":
            self._hold_buckets(step.weights().values(), training.ddp.gradient_as_bucket_view)

    def _follow_weights(self) -> None:
        """FSDP may have replaced the weights with shards in host memory."""
        held = [*self._model.parameters(), *self._model.buffers(), *self._held]
        self._weights |= self._allocations.follow(held)

    def _hold_buckets(self, parameters: Iterable[torch.Tensor], as_gradients: bool) -> None:
        """Allocate DDP's buckets.

        Args:
            as_gradients: each gradient is moved into its bucket as soon as it is computed, without a copy.
        """
        for parameter in parameters:
            with self._fake:
                bucket = torch.empty_like(parameter, requires_grad=False)
            self._gradients |= self._allocations.follow([bucket])
            self._buckets.append(bucket)
            if as_gradients:
                put: Any = parameter.register_post_accumulate_grad_hook
                put(functools.partial(_put_into, bucket))

    def end(self, end: int) -> int:
        """The end of a loop that is long enough."""
        return max(end, STEPS + 1)

    def batch(self, given: Any) -> Any:
        """The batch without values."""
        return batches.map_tensors(self._fake.from_tensor, given)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Simulate the step within this block."""
        hooks = (
            register_optimizer_step_pre_hook(self._before_update),
            register_optimizer_step_post_hook(self._after_update),
        )
        try:
            stance = torch.compiler.set_stance("force_eager")
            with stance, _nothing_is_written(), self._fake, self._allocations, _AsPython():
                self._follow_weights()
                self._allocations.begin()
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def parts(self, parts: Iterator[Any], step: int) -> Iterator[Any]:
        """As many micro-batches as the peak takes; a pipeline's depends on them all."""
        return parts if self._is_pipeline else itertools.islice(parts, PARTS[step])

    def result_after(self, step: int) -> dict[str, Any] | None:
        """The `result`, if this was the last simulated step."""
        return self.result() if step == STEPS else None

    def result(self) -> dict[str, Any]:
        """The peak of the last step in bytes, when it occurred, and what it was used for (see KINDS).

        Offloaded weights, gradients and optimizer state are in host memory and do not count.
        """
        state = (t for o in self._optimizers.values() for of in o.state.values() for t in tree_leaves(of))
        known = {
            "weights": self._weights,
            "optimizer": self._allocations.follow(t for t in state if isinstance(t, torch.Tensor)),
            "gradients": self._gradients,
        }
        peak = self._allocations.peak(but=set().union(*known.values()) if self._is_offloaded else set())
        known["gathered"] = self._allocations.resized
        by_kind = dict.fromkeys(KINDS, 0)
        for key, size in peak.held.items():
            by_kind[next((kind for kind, keys in known.items() if key in keys), "activations")] += size
        return {"peak": peak.total, "moment": peak.moment, **by_kind}

    def _moment(self) -> str:
        if self._updating:
            return "update"
        return "forward" if torch._C._current_graph_task_id() == -1 else "backward"

    def _before_update(self, optimizer: Optimizer, *_: Any) -> None:
        self._updating = True
        self._optimizers[id(optimizer)] = optimizer
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True  # torch's default on a GPU, which takes more memory than on a CPU
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        self._gradients |= self._allocations.follow(gradients.of(parameters))

    def _after_update(self, *_: Any) -> None:
        self._updating = False


@contextlib.contextmanager
def _nothing_is_written() -> Iterator[None]:
    """Disable a loop's own `torch.save`: the target may be an existing file with real values."""
    with unittest.mock.patch.object(torch, "save", return_value=None):
        yield


class _AsPython(TorchFunctionMode):
    """Answers requests for values that are not operations: formatting, arrays, lists of numbers."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _OF_LISTS and isinstance(args[0], list | tuple):
            args = tree_map_only(FakeTensor, lambda tensor: _array(tensor).tolist(), args)
        elif function in _OF_ONE and isinstance(args[0], FakeTensor):
            return _OF_ONE[function](*args, **kwargs)
        return function(*args, **kwargs)


def _array(tensor: torch.Tensor, *_: Any, **__: Any) -> Any:
    return np.ones(tuple(tensor.shape), _named(tensor.dtype))


def _named(dtype: torch.dtype) -> str:
    return "float32" if dtype is torch.bfloat16 else str(dtype).removeprefix("torch.")


_OF_ONE: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__format__: lambda tensor, how: format(_array(tensor).item(), how),
    torch.Tensor.numpy: _array,
    torch.Tensor.__array__: _array,
}
_OF_LISTS = {torch.tensor, torch.as_tensor}


@contextlib.contextmanager
def unfollowed() -> Iterator[None]:
    """What runs within this block of a step does not belong to this rank and is not tracked."""
    with _disable_current_modes(), _WithoutValues():
        yield


class _WithoutValues(Allocations):  # type: ignore[no-untyped-call]
    """Answers operations that ask fake tensors for values."""

    def call(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], FakeTensor):
            return function(*args, **kwargs)
        if function in _ANSWERS:
            return _ANSWERS[function](function, *args, **kwargs)
        result = function(*args, **kwargs)
        if _asks_for_what_is_not_finite(function, args):
            result._stoker_is_false = True
        return result


def _asks_for_what_is_not_finite(function: Any, args: Any) -> bool:
    """Whether the operation asks which values are not finite, or whether any are."""
    if function in (_aten.isnan.default, _aten.isinf.default):
        return True
    any_of = function in (_aten.any.default, _aten.any.dim, _aten.logical_or.default, _aten.bitwise_or.Tensor)
    return any_of and all(hasattr(a, "_stoker_is_false") for a in args if isinstance(a, FakeTensor))


def _number(_: Any, tensor: torch.Tensor) -> bool | float | int:
    if tensor.dtype is torch.bool:
        return not hasattr(tensor, "_stoker_is_false")
    return 1.0 if tensor.is_floating_point() else 1


def _nonzero(_: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.long)


def _selected(_: Any, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(torch.logical_and(tensor, mask).numel())


def _indexed(function: Any, tensor: torch.Tensor, indices: Any, *others: Any) -> Any:
    return function(tensor, _without_masks(indices), *others)


def _pinned(_: Any, tensor: torch.Tensor, *__: Any) -> torch.Tensor:
    return torch.empty_like(tensor)


def _grouped(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A grouped product of experts, whose fake form torch implements only for bf16."""
    half = [a.bfloat16() if isinstance(a, FakeTensor) and a.is_floating_point() else a for a in args]
    found: torch.Tensor = function(*half, **kwargs).to(args[0].dtype)
    return found


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.ops.prim.device.default: lambda _, tensor: tensor.fake_device,
    _aten._local_scalar_dense.default: _number,
    _aten.equal.default: lambda *_: True,
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: _selected,
    _aten.index.Tensor: _indexed,
    _aten.index_put.default: _indexed,
    _aten.index_put_.default: _indexed,
    _aten._pin_memory.default: _pinned,
    _aten._grouped_mm.default: _grouped,
}


def _without_masks(indices: Any) -> list[Any]:
    """The indices, with each mask replaced by what an all-true mask selects."""
    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]
        else:
            found.append(index)
    return found


def _put_into(bucket: torch.Tensor, parameter: torch.Tensor) -> None:
    parameter.grad = bucket


def _there(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """For a tensor on the meta device, one on a device, without values."""
    return like(tensor, torch.empty_like(local(tensor), device=device))
