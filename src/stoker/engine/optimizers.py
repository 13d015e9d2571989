"""Optimizers by name, for recipes; your own loop gives `Trainer` whatever it likes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from stoker.errors import BadInput

Name = Literal["adamw", "sgd", "adafactor", "adamw8bit"]
Parameters = list[torch.nn.Parameter]
Factory = Callable[[Parameters], torch.optim.Optimizer]


def factory(
    name: Name,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.9,
) -> Factory:
    """What makes the optimizer of a list of parameters.

    adamw: Loshchilov & Hutter 2019 (arXiv:1711.05101), fused. sgd: with Nesterov momentum, fused.
    adafactor: Shazeer & Stern 2018 (arXiv:1804.04235). adamw8bit: states in 8 bits by block,
    Dettmers et al. 2022 (arXiv:2110.02861), by torchao or bitsandbytes.

    Raises:
        BadInput: the extra that has it is not installed.
    """
    if name == "adamw":
        return lambda ps: torch.optim.AdamW(
            ps, lr=lr, betas=betas, weight_decay=weight_decay, fused=_fusable(ps)
        )
    if name == "sgd":
        nesterov = momentum > 0
        return lambda ps: torch.optim.SGD(
            ps, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=_fusable(ps)
        )
    if name == "adafactor":
        return lambda ps: torch.optim.Adafactor(ps, lr=lr, weight_decay=weight_decay)
    return _adamw8bit(lr, betas, weight_decay)


def _adamw8bit(lr: float, betas: tuple[float, float], weight_decay: float) -> Factory:
    if importlib.util.find_spec("torchao") is not None:
        from torchao.optim import AdamW8bit

        return lambda ps: AdamW8bit(ps, lr=lr, betas=betas, weight_decay=weight_decay)
    if importlib.util.find_spec("bitsandbytes") is not None and torch.cuda.is_available():
        import bitsandbytes

        return lambda ps: bitsandbytes.optim.AdamW8bit(ps, lr=lr, betas=betas, weight_decay=weight_decay)
    raise BadInput("optimizer=adamw8bit needs torchao: pip install 'stoker[quantisation]'")


def _fusable(parameters: Parameters) -> bool:
    """Whether torch's fused kernels take these parameters: floating point, on CPU or GPU."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
