"""States of torchao's 8-bit optimizers in a checkpoint, to the same bits (Dettmers et al., arXiv:2110.02861).

Such a state has a code for each value, which a fixed table maps to a number of at most 1, and a scale for
each block of 256 successive values. Blocks are counted within the part of a parameter that a rank holds, and
a rank with few values does not quantise them. So that a checkpoint fits any layout, it has the codes in the
parameter's shape, and the scales of groups of values along the last dimension, which no block divides. Where
blocks are the same as when it was saved, they get the same codes and scales; elsewhere the values, the
product of both, are quantised again.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from stoker import tensors
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

CODES, SCALES = "[codes]", "[scales]"
"""What is added to the name of a state."""

_ONE = 255
"""The code of 1."""


def is_of(optimizer: Any) -> bool:
    """Whether an optimizer quantises its states to 8 bits by torchao."""
    torchao = sys.modules.get("torchao.optim")  # loaded if it is one
    return torchao is not None and isinstance(optimizer, (torchao.Adam8bit, torchao.AdamW8bit))


def is_quantised(optimizer: Any, state: torch.Tensor) -> bool:
    """Whether a state has 8 bits on a rank that shares it; the answer is the same on all of them."""
    return is_of(optimizer) and (_is_one(tensors.local(state)) or _is_uneven(state))


def parts(optimizer: Any, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a state, and its scales: (..., n) and (..., n / the size of a group)."""
    held: Any = tensors.local(state)
    group = _group(optimizer, state)
    if _is_one(held):
        codes, scales = held.codes, held.scale.repeat_interleave(held.block_size // group)
    else:
        codes, scales = torch.full_like(held, _ONE, dtype=torch.uint8), held
    shape = (*state.shape[:-1], state.shape[-1] // group)
    return tensors.like(state, codes), tensors.like(state, scales.view(*codes.shape[:-1], -1), shape)


def together(
    optimizer: Any, parameter: torch.nn.Parameter, key: str, codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """The state `key` of a parameter from its codes, laid out like the parameter, and all of its scales."""
    state = _zeros(optimizer, parameter, key)
    held: Any = tensors.local(state)
    codes = tensors.local(codes).to(parameter.device)
    scales = _own_scales(parameter, scales).to(parameter.device)
    if _is_one(held):
        of_blocks = scales.reshape(-1, held.block_size)
        if torch.equal(of_blocks, of_blocks[:, :1].expand_as(of_blocks)):
            held.codes.copy_(codes)
            held.scale.copy_(of_blocks[:, 0])
            return state
    held.copy_(_table(key).to(parameter.device)[codes.int()] * scales)
    return state


def as_made(optimizer: Any, parameter: torch.nn.Parameter, key: str, value: torch.Tensor) -> torch.Tensor:
    """A state `key` as the optimizer would have it: quantised, if it makes that of such a parameter."""
    if key == "step" or not is_of(optimizer):
        return value
    state = _zeros(optimizer, parameter, key)
    tensors.local(state).copy_(tensors.local(value))
    return state


def _is_one(held: Any) -> bool:
    return type(held).__name__ == "OptimState8bit"


def _is_signed(key: str) -> bool:
    return key == "exp_avg"


def _zeros(optimizer: Any, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
    made: torch.Tensor = optimizer._new_buffer(parameter.detach(), _is_signed(key))
    return made


def _table(key: str) -> torch.Tensor:
    """The numbers of the 256 codes."""
    from torchao.optim import subclass_8bit

    of = subclass_8bit.get_qmap_signed if _is_signed(key) else subclass_8bit.get_qmap_unsigned
    return torch.tensor(of())


def _shards(state: torch.Tensor) -> dict[int, int]:
    """The dimensions in which a tensor is sharded, and over how many ranks."""
    if not isinstance(state, DTensor):
        return {}
    over = zip(state.placements, state.device_mesh.shape, strict=True)
    return {place.dim: size for place, size in over if isinstance(place, Shard)}


def _is_uneven(state: torch.Tensor) -> bool:
    """Whether ranks hold unequal parts."""
    return any(state.shape[dim] % size for dim, size in _shards(state).items())


def _group(optimizer: Any, state: torch.Tensor) -> int:
    """The number of values that share a scale in the checkpoint: within a row, and within every block."""
    shards = _shards(state)
    if not shards.keys() <= {0} or _is_uneven(state):
        return 1
    row = state.shape[-1] // (shards.get(0, 1) if state.ndim == 1 else 1)
    return math.gcd(optimizer.block_size, row)


def _own_scales(parameter: torch.nn.Parameter, scales: torch.Tensor) -> torch.Tensor:
    """The scale of each value that this rank holds of a parameter."""
    if isinstance(scales, DTensor):  # one for each value
        return scales.to_local()
    group = parameter.shape[-1] // scales.shape[-1]
    if not isinstance(parameter, DTensor):
        return scales.repeat_interleave(group, dim=-1)
    mesh, places = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, places)
    *rows, last = (slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
    return scales[(*rows,)].repeat_interleave(group, dim=-1)[..., last]
