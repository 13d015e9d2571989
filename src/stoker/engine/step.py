"""A step: how a global batch becomes one update of the weights.

There are three implementations, for the three ways to drive a forward and backward pass: `PlainStep`
here, for a model that is called (single, DDP, FSDP), `PipelineStep` and `DeepSpeedStep`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from stoker import tensors
from stoker.engine import arguments, gradients
from stoker.engine.agreement import Agreement, Weight
from stoker.engine.in_backward import InBackward
from stoker.engine.loss_scale import LossScale
from stoker.engine.mesh import Mesh
from stoker.engine.precision import Resolved, autocast
from stoker.engine.replicas import Replicas
from stoker.errors import StokerError
from torch import nn

LossFunction = Callable[[Any, Any], tuple[torch.Tensor, Weight]]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Optimizers = Mapping[str, torch.optim.Optimizer]
Load = Callable[[nn.Module, torch.device, str], None]
"""Allocates and fills what is on the meta device of a model, below a dotted prefix (all: "")."""
Blocks = Sequence[tuple[str, nn.Module]]
"""The repeated blocks of a model, with their names."""


class Step(Protocol):
    """One strategy's forward, backward and update."""

    @property
    def model(self) -> nn.Module:
        """This rank's part of the model, with its parameters under their original names."""
        ...

    @property
    def optimizers(self) -> Optimizers:
        """The optimizers by name; a single one is called `main`."""
        ...

    def gradients(self, parts: Sequence[Any], agreement: Agreement) -> None:
        """Accumulate the gradients of this rank's micro-batches; start the reduction of loss and weight."""
        ...

    def forward(self, batch: Any) -> Any:
        """The model's output without gradients; all ranks call it. None if the output is on another rank."""
        ...

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of a forward pass, unless the strategy casts by itself."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights, in float32, by name, as held by this rank."""
        ...

    def publish(self) -> None:
        """Make the forward pass use what was written to the weights; all ranks call it."""
        ...

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A full parameter or buffer of this rank's part of the model. Ranks that share the part call it."""
        ...

    def update(self, optimizers: Sequence[torch.optim.Optimizer], weight: torch.Tensor) -> bool:
        """Divide by the weight of the global batch, clip, step these optimizers, clear.

        Returns False if nothing was changed: fp16 overflowed, or a gradient was found not to be finite.
        """
        ...

    def clear(self) -> None:
        """Discard the accumulated gradients."""
        ...

    @property
    def norm(self) -> torch.Tensor | float | None:
        """The L2 norm of the last update's gradient, before clipping; None if nothing needed it."""
        ...


@dataclass(frozen=True)
class Setting:
    """The settings that every kind of step takes."""

    mesh: Mesh
    inputs: Callable[[Any], Any]
    loss: LossFunction | None
    precision: Resolved
    scale: LossScale
    clip_norm: float | None
    guarded: bool = False
    """Whether to always check gradients for non-finite values; if not, only when it costs nothing."""

    def call(self, model: nn.Module, batch: Any) -> Any:
        """The output of a model for a batch. Raises BadInput if the batch's items are not its arguments."""
        inputs = self.inputs(batch)
        if not isinstance(inputs, Mapping):
            return model(*inputs)
        try:
            return model(**inputs)
        except TypeError as error:
            arguments.explain_inputs(model, inputs, error)
            raise

    def loss_of(self, output: Any, batch: Any) -> tuple[torch.Tensor, Weight]:
        """The summed loss of a micro-batch and its weight, under autocast whatever casts the forward pass.

        A sum over a batch overflows in fp16, and is rounded in bf16. Raises TypeError if `loss` returns
        something else.
        """
        assert self.loss is not None
        with self.autocast():
            found = self.loss(output, batch)
        if isinstance(found, tuple | list) and len(found) == 2 and _is_scalar(found[0]):
            return found[0], found[1]
        parts = found if isinstance(found, tuple | list) else [found]
        said = " and ".join(map(_type_and_shape, parts))
        raise TypeError(
            f"loss returned {said}: it must return two values, a scalar loss summed over the batch and what "
            'to divide it by, such as (cross_entropy(output, y, reduction="sum"), len(y))'
        )

    def autocast(self) -> Any:
        """The context of a forward pass."""
        return autocast(self.precision, self.mesh.device)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _type_and_shape(value: Any) -> str:
    """A value for a message: its type, and a tensor's shape."""
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"a {type(value).__name__}{shape}"


class PlainStep:
    """A model that is called and a loss that is differentiated.

    Args:
        model: the model, with its parameters under their original names.
        replicas: what is called in training, if several ranks hold copies of the model.
        casts: whether the strategy itself casts to the precision, as FSDP does.
        in_backward: whether the optimizer steps within the backward pass, see `engine.in_backward`.
    """

    def __init__(
        self,
        setting: Setting,
        model: nn.Module,
        optimizers: Optimizers,
        *,
        replicas: Replicas | None = None,
        casts: bool = False,
        in_backward: bool = False,
    ) -> None:
        self.in_backward = in_backward
        self.norm: torch.Tensor | float | None = None
        self._in_backward = (
            [InBackward(optimizer) for optimizer in optimizers.values()] if in_backward else []
        )
        self.model = model
        self.optimizers = optimizers
        self._adds_up = self._has_added = False
        for optimizer in optimizers.values():
            optimizer.register_step_post_hook(self._used)
        self._setting = setting
        self._parameters = list(model.parameters())  # finding them takes as long as clearing them
        self._casts = casts
        self._replicas = replicas
        self._reduced = True
        self._discarded: set[int] = set()
        self._statistics = running_statistics(model) if setting.mesh.data.size > 1 else []

    def gradients(self, parts: Sequence[Any], agreement: Agreement) -> None:
        """See `Step`. DDP reduces with the last micro-batch; FSDP, which keeps only shards, with each."""
        for one in self._in_backward:
            one.begin()
        if self._replicas is not None:
            self._replicas.begin()
        loss_sum: torch.Tensor | None = None
        weight: Weight = 0.0
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            if self._replicas is not None:
                self._replicas.reduce_next(last)
            with self.context():
                part_sum, part_weight = self._setting.loss_of(self._call(part), part)
            loss_sum = part_sum.detach() if loss_sum is None else loss_sum + part_sum.detach()
            weight = weight + part_weight
            if last:
                agreement.start(loss_sum, weight)
            if not self.in_backward:
                self._backward(part_sum)
            elif not part_sum.is_cpu or part_sum.isfinite():  # do not wait for a GPU
                self._backward(part_sum / gradients.divisor(torch.as_tensor(part_weight)))
        if self._replicas is not None:
            self._replicas.check()
        self._reduced = True

    def _call(self, part: Any) -> Any:
        """The output in training. Raises StokerError if DDP waits for gradients that never come."""
        if self._replicas is None:
            return self._setting.call(self.model, part)
        with self._replicas.explained():
            return self._setting.call(self._replicas.called, part)

    def forward(self, batch: Any) -> Any:
        """See `Step`; with gradients if they are enabled, for a loop with its own backward pass."""
        with self.context():
            return self._setting.call(self.model, batch)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Step`."""
        return named_trainable(self.model)

    def publish(self) -> None:
        """See `Step`: the forward pass uses the weights themselves."""

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Step`."""
        return tensors.whole(tensor.detach())

    @property
    def adding_up(self) -> bool:
        """Whether there are gradients of a user's own loop that no optimizer has used yet."""
        return self._adds_up and self._have_gradients()

    @property
    def was_cleared(self) -> bool:
        """Whether a user's own loop has cleared the gradients of its last backward pass itself."""
        return self._adds_up and self._has_added and not self._have_gradients()

    def _have_gradients(self) -> bool:
        return any(parameter.grad is not None for parameter in self._parameters)

    def backward(self, loss_sum: torch.Tensor) -> None:
        """The backward pass of a user's own loop; `update` reduces its gradients."""
        self._backward(loss_sum)
        self._reduced, self._adds_up = False, True
        self._has_added = self._have_gradients()
        self._discarded.clear()

    def update(self, optimizers: Sequence[torch.optim.Optimizer], weight: torch.Tensor) -> bool:
        """See `Step`. Raises ValueError if an earlier update has cleared all gradients of an optimizer."""
        setting = self._setting
        if self.in_backward:
            for one in self._in_backward:
                one.end()
            return True
        updated = parameters_of(optimizers)
        if self._replicas is not None and not self._reduced:
            group = setting.mesh.group("replicate")
            gradients.agree(updated, group)
            gradients.average(gradients.of(updated), group)
        self._check_cleared(optimizers)
        if len(self.optimizers) > 1:
            self._discarded |= {id(p) for p in self._parameters if p.grad is not None} - {*map(id, updated)}
        stepped, self.norm = apply(gradients.of(updated), optimizers, weight, setting)
        self.clear()
        average_statistics(self._statistics, setting.mesh)
        return stepped

    def clear(self) -> None:
        """See `Step`."""
        self._adds_up = False
        for parameter in self._parameters:
            parameter.grad = None

    def _check_cleared(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers if self._discarded else ():
            own = parameters_of([optimizer])
            if not gradients.of(own) and any(id(p) in self._discarded for p in own):
                raise ValueError(
                    f"update() of {type(optimizer).__name__} has no gradients left: the update before it has "
                    "cleared those of all optimizers. Optimizers that step with the gradients of the same "
                    "losses take them in one call, trainer.update(a, b); others take a trainer.backward(...) "
                    "of their own before their update"
                )

    def _used(self, *_: Any) -> None:
        self._adds_up = False

    def _backward(self, loss_sum: torch.Tensor) -> None:
        if self._setting.scale.enabled:
            loss_sum = loss_sum * self._setting.scale.factor
        torch.autograd.backward(loss_sum)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """See `Step`."""
        return contextlib.nullcontext() if self._casts else self._setting.autocast()


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """The parameters that these optimizers have, each once."""
    return list({id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}.values())


def apply(
    found: list[torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    weight: torch.Tensor,
    setting: Setting,
) -> tuple[bool, torch.Tensor | None]:
    """Turn gradients of sums, averaged over the data ranks, into gradients of the mean; clip; step.

    Returns:
        False if nothing was changed: fp16 overflowed, or a gradient was found not to be finite. And the
        norm of the mean's gradient before clipping, if it was needed.
    """
    mean = None
    factor = gradients.reciprocal(weight) * (setting.mesh.data.size / setting.scale.factor)
    if setting.clip_norm is not None or setting.scale.enabled or setting.guarded:
        norm = gradients.norm(found, setting.mesh.group("stage"))
        if setting.scale.enabled:
            overflowed = not bool(norm.isfinite())
            setting.scale.update(overflowed)
            if overflowed:
                return False, None
        elif (setting.guarded or norm.device.type == "cpu") and not bool(norm.isfinite()):
            return False, None
        mean = norm * factor
        factor = gradients.clipped(factor, norm, setting.clip_norm)
    gradients.scale(found, factor)
    for optimizer in optimizers:
        optimizer.step()
    return True, mean


def build_optimizers(
    model: nn.Module, factories: OptimizerFactory | Mapping[str, OptimizerFactory]
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of a model that is already parallelised.

    Raises:
        BadInput: one of them cannot be used.
        ValueError: nothing is trained.
    """
    if not isinstance(factories, Mapping):
        built = {"main": factories(trainable(model))}
    else:
        built = {name: make(trainable(model.get_submodule(name))) for name, make in factories.items()}
    for optimizer in built.values():
        arguments.check_built(optimizer, model)
    return built


def remember_rates(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Store the rates of all groups as their `initial_lr`, which a schedule multiplies."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", copy.deepcopy(group["lr"]))  # a tensor is changed in place


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters. Raises ValueError if there are none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no trainable parameters: all have requires_grad=False")
    return parameters


def named_trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def average_statistics(statistics: list[torch.Tensor], mesh: Mesh) -> None:
    """Average BatchNorm's running statistics over all data ranks."""
    if statistics:
        for axis in ("replicate", "shard"):
            if mesh.size(axis) > 1:
                gradients.average(statistics, mesh.group(axis))


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """The running means and variances of a model's BatchNorms."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found += [b for b in (module.running_mean, module.running_var) if b is not None]
    return found


def only_loop_of_its_own(step: Step) -> PlainStep:
    """The step, if its parts can be called separately. Raises StokerError."""
    if isinstance(step, PlainStep) and not step.in_backward:
        return step
    if isinstance(step, PlainStep):
        raise StokerError(
            "optimizer_in_backward=true updates weights inside trainer.step(batch): use that method, or omit "
            "the setting"
        )
    raise StokerError(
        f"{type(step).__name__} drives forward and backward itself: use trainer.step(batch), "
        "or parallel=single, ddp or fsdp"
    )
