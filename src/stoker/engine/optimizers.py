"""Optimizers by name, for recipes. In your own loop, pass any optimizer to `Trainer`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from stoker.engine.adafactor import Adafactor
from stoker.engine.muon import Muon
from stoker.errors import BadInput
from torch.distributed.tensor import DTensor

Name = Literal["adamw", "muon", "sgd", "adafactor", "adamw8bit"]
Parameters = list[torch.nn.Parameter]
Find = Callable[[], Iterable[torch.nn.Parameter]]
Factory = Callable[[Parameters], torch.optim.Optimizer]


class Keys(Protocol):
    """The optimizer settings of a recipe's config, as `factory` takes them."""

    @property
    def optimizer(self) -> Name: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def decay_all(self) -> bool: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...


@dataclass(frozen=True)
class Faster:
    """Parameters with a learning rate of their own."""

    ratio: float
    """Their rate, as a multiple of `lr`."""
    find: Find
    """Returns them. It is called when the optimizer is built: laying out a model can replace parameters."""


def asked_for(
    config: Keys,
    *,
    lr: float,
    momentum: float = 0.9,
    faster: Faster | None = None,
    hidden: Find | None = None,
) -> Factory:
    """The `factory` that a recipe's config asks for."""
    return factory(
        config.optimizer, lr=lr, weight_decay=config.weight_decay, decay_all=config.decay_all,
        betas=config.betas, eps=config.eps, momentum=momentum, faster=faster, hidden=hidden,
    )  # fmt: skip


def factory(
    name: Name,
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay_all: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    faster: Faster | None = None,
    hidden: Find | None = None,
) -> Factory:
    """A function that builds the optimizer for a list of parameters.

    adamw: Loshchilov & Hutter 2019 (arXiv:1711.05101), fused. muon: see `engine.muon`. sgd: with Nesterov
    momentum, fused.
    adafactor: Shazeer & Stern 2018 (arXiv:1804.04235). adamw8bit: block-wise 8-bit states, Dettmers
    et al. 2022 (arXiv:2110.02861), from torchao or bitsandbytes.

    Args:
        decay_all: whether weight decay also applies to norms and biases, see `groups`.
        betas: for adamw, adamw8bit and what muon does not orthogonalise, like `eps`.
        momentum: for sgd.
        faster: parameters with another learning rate than `lr`; they are in the last groups.
        hidden: returns what muon orthogonalises, and is called as `Faster.find` is; by default everything of
            two or three dims.

    Raises:
        BadInput: the extra that provides it is not installed.
    """
    make = _of_groups(name, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, momentum=momentum)

    def decayed(ps: Parameters) -> list[dict[str, Any]]:
        return [{"params": ps}] if decay_all or weight_decay == 0 else groups(ps)

    def grouped(ps: Parameters) -> list[dict[str, Any]]:
        if name != "muon":
            return decayed(ps)
        chosen = {p for p in (ps if hidden is None else hidden()) if dimensions(p) in (2, 3)}
        matrices = {"params": [p for p in ps if p in chosen], "orthogonal": True}
        return [matrices, *decayed([p for p in ps if p not in chosen])]

    def build(ps: Parameters) -> torch.optim.Optimizer:
        if faster is None or faster.ratio == 1:
            return make(grouped(ps))
        chosen = set(faster.find())
        others = grouped([p for p in ps if p not in chosen])
        own = grouped([p for p in ps if p in chosen])
        return make([*others, *({**group, "lr": lr * faster.ratio} for group in own)])

    return build


def groups(parameters: Parameters) -> list[dict[str, Any]]:
    """Two groups: with weight decay, and, for parameters with at most one dim such as norms, without.

    Either can be empty, so that all stages of a pipeline have the same groups.
    """
    decayed = [p for p in parameters if dimensions(p) > 1]
    others = [p for p in parameters if dimensions(p) <= 1]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def dimensions(parameter: torch.nn.Parameter) -> int:
    """The number of dims of the whole parameter: DeepSpeed's partitioned parameters are empty vectors."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _of_groups(
    name: Name, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, momentum: float
) -> Callable[[Any], torch.optim.Optimizer]:
    if name == "adamw":
        return lambda ps: torch.optim.AdamW(
            ps, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=_fusable(ps)
        )
    if name == "muon":
        return lambda ps: Muon(ps, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=_fusable(ps))
    if name == "sgd":
        nesterov = momentum > 0
        return lambda ps: torch.optim.SGD(
            ps,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            fused=_fusable(ps) and not _sharded(ps),  # torch's fused SGD does not support sharded parameters
        )
    if name == "adafactor":
        return lambda ps: Adafactor(ps, lr=lr, weight_decay=weight_decay)
    return _adamw8bit(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _adamw8bit(**settings: Any) -> Callable[[Any], torch.optim.Optimizer]:
    if importlib.util.find_spec("torchao") is not None:
        from torchao.optim import AdamW8bit

        return lambda ps: AdamW8bit(ps, **settings)
    if importlib.util.find_spec("bitsandbytes") is not None and torch.cuda.is_available():
        import bitsandbytes

        return lambda ps: bitsandbytes.optim.AdamW8bit(ps, **settings)
    raise BadInput("optimizer=adamw8bit needs torchao: pip install 'stoker[quantisation]'")


def _fusable(given: Sequence[Any]) -> bool:
    """Whether torch's fused kernels support these parameters or groups: floating point, on CPU or GPU."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in _flat(given))


def _sharded(given: Sequence[Any]) -> bool:
    return any(isinstance(p, DTensor) for p in _flat(given))


def _flat(given: Sequence[Any]) -> list[Any]:
    return [p for one in given for p in (one["params"] if isinstance(one, dict) else [one])]
