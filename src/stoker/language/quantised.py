"""Frozen weights in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), with bitsandbytes.

A weight is stored as NF4 codes with one scale per 64 of them, row by row, so that a rank's share of the
rows is quantised exactly like the whole: what FSDP or ZeRO shards are plain byte tensors. The numbers are
those of transformers' `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")`.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from stoker.errors import BadInput
from stoker.language import targets
from stoker.language.loading import Quantised
from stoker.tensors import like, local
from stoker.world import World
from torch import nn
from torch.distributed.tensor import DTensor

log = logging.getLogger("stoker")

_BLOCK = 64  # weights that share a scale


def check() -> None:
    """Raises BadInput if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("quantisation=nf4 needs bitsandbytes: pip install 'stoker[quantisation]'")


def convert(model: Any, world: World) -> None:
    """Make a model on the meta device store the weights of its linear layers, except the head, in 4 bits.

    The experts of a mixture, many of whose weights are fused into one tensor, are not changed, with a
    warning.

    Raises:
        BadInput: bitsandbytes is not installed, or nothing can be quantised.
    """
    check()
    head = model.get_output_embeddings()
    found = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not head and child.in_features % _BLOCK == 0:
                setattr(module, name, Linear4bit(child))
                found += 1
    if not found:
        raise BadInput(
            f"quantisation=nf4: a {type(model).__name__} of this size has no linear layer whose row length "
            f"is a multiple of {_BLOCK}"
        )
    left = sum(weight.nbytes for weight in targets.experts(model).values())
    if left and world.rank == 0:
        log.warning(
            "quantisation=nf4: the experts of a %s are not linear layers and stay in %s: %.1f GiB",
            model.config.model_type, str(model.dtype).removeprefix("torch."), left / 2**30,
        )  # fmt: skip


class Linear4bit(Quantised, nn.Linear):
    """A linear layer whose frozen weight is stored in 4 bits.

    `weight` is uint8 (out, in / 2), two codes per byte; `scales` is uint8 (out, in / 64 * 4), one float32
    per block stored as bytes, so that no strategy rounds them to its precision.
    """

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.dtype = plain.weight.dtype
        self.weight = self._bytes(plain.in_features // 2)
        self.scales = self._bytes(plain.in_features // _BLOCK * 4)
        self.register_parameter("bias", plain.bias)

    def _bytes(self, width: int) -> nn.Parameter:
        empty = torch.empty(self.out_features, width, dtype=torch.uint8, device="meta")
        return _frozen(empty)

    def plain(self) -> torch.Tensor:
        """See `Quantised`."""
        weight = self.weight
        if not isinstance(weight, DTensor):
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        own = torch.empty(len(weight.to_local()), self.in_features, dtype=self.dtype, device="meta")
        whole = torch.Size((self.out_features, self.in_features))
        return DTensor.from_local(
            own, weight.device_mesh, weight.placements, run_check=False, shape=whole,
            stride=(self.in_features, 1),
        )  # fmt: skip

    def take(self, weight: torch.Tensor) -> None:
        """See `Quantised`."""
        own = local(weight)
        codes, scales = _quantise(own)
        self.weight = _frozen(like(self.weight, codes.view(len(own), -1)))
        self.scales = _frozen(like(self.scales, scales.view(len(own), -1)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        made: torch.Tensor = _Product.apply(input, self.weight, self.scales, bias)  # type: ignore[no-untyped-call]
        return made


class _Product(torch.autograd.Function):
    """`input @ weight.T + bias`; the weight is dequantised again for the backward pass, and never kept."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        return nn.functional.linear(input, _dequantise(codes, scales, input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        codes, scales = ctx.saved_tensors
        return gradient @ _dequantise(codes, scales, gradient.dtype), None, None, None


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, both uint8 and flat, of a weight (out, in)."""
    if not weight.numel():
        return (torch.empty(0, dtype=torch.uint8, device=weight.device),) * 2
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=_BLOCK, quant_type="nf4", compress_statistics=False
    )
    return codes.flatten(), state.absmax.float().view(torch.uint8)


def _dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(out, in / 2), (out, in / 64 * 4) -> (out, in)."""
    from bitsandbytes import functional

    shape = torch.Size((len(codes), codes.shape[1] * 2))
    if not shape.numel():
        return torch.empty(shape, dtype=dtype, device=codes.device)
    state = functional.QuantState(
        absmax=scales.contiguous().view(torch.float32).flatten(), shape=shape,
        code=functional.get_4bit_type("nf4", device=codes.device), blocksize=_BLOCK, quant_type="nf4",
        dtype=dtype,
    )  # fmt: skip
    made: torch.Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return made
