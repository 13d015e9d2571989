"""Attention within documents: rows hold several packed documents, and no token sees another document.

It is registered with transformers under `NAME`, so that any model whose attention uses the
`AttentionInterface` can use it. It receives the lengths of each row's documents: on a GPU in half
precision it runs one kernel with variable lengths (torch's `varlen_attn`), elsewhere one call of torch's
causal attention per document, which computes nothing that is masked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "documents"
DOCUMENTS = "documents"
"""The keyword argument with the documents' lengths: int (rows, most in a row), filled with 0. The rest of a
row is padding.
"""

_WIDEST = 256  # entries of a head in flash attention
_WITHIN_DOCUMENTS = {"full_attention", "sliding_attention"}
_SINKS = {"gpt_oss", "flint", "granite_swa", "granitemoe_swa", "mimo_v2_flash"}
"""Families whose softmax has an additional term."""
_OWN_MASKS = {"doge"}
"""Families in which each layer makes its own mask."""


def packs(config: Any, supports: bool) -> bool:
    """Whether a model can attend within documents, by its config: all layers must, and none may carry state.

    Args:
        supports: whether its class supports attention functions (`_supports_attention_backend`).
    """
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ())
    carries = hasattr(text, "state_size")
    differs = text.model_type in _SINKS | _OWN_MASKS
    return supports and not carries and not differs and layers <= _WITHIN_DOCUMENTS


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document; signature and result follow transformers.

    Args:
        query: (rows, heads, seq, width).
        key: (rows, key heads, seq, width); the heads of `query` are a multiple of the key heads.
        value: like `key`.
        attention_mask: unused.
        sliding_window: the number of tokens that a token sees, including itself.
        softcap: scores are limited to this absolute value with tanh (Gemma 2).
        documents: see DOCUMENTS; None: derived from `position_ids`, and without these a row is one document.
        position_ids: (rows, seq), 0 where a document begins.

    Returns:
        (rows, seq, heads, width), zeros in the padding after the documents; and None for the weights.
    """
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):  # rotary embeddings are float32
        computed = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(computed), key.to(computed), value.to(computed)
    window = sliding_window if sliding_window is not None and sliding_window < query.shape[2] else None
    dropped = dropout if module.training else 0.0
    if _varlen_takes(query, value, dropped, softcap) and documents is not None:
        return _varlen(query, key, value, documents, scaling, window), None
    one = functools.partial(_attend_one, scaling=scaling, dropout=dropped, window=window, softcap=softcap)
    return _one_by_one(query, key, value, documents, position_ids, one), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # how many calls there are, values tell
def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One call of `attend` per document."""
    rows = []
    for q, k, v, sizes in zip(query, key, value, _lengths(documents, position_ids, query), strict=True):
        rest = query.shape[2] - sum(sizes)
        parts = zip(*(tensor.split([*sizes, rest], dim=1)[:-1] for tensor in (q, k, v)), strict=True)
        done = [attend(a, b, c) for a, b, c in parts]
        rows.append(torch.cat([*done, v.new_zeros(q.shape[0], rest, v.shape[2])], dim=1))
    return torch.stack(rows).transpose(1, 2).contiguous()


def _lengths(
    documents: torch.Tensor | None, position_ids: torch.Tensor | None, query: torch.Tensor
) -> Iterator[list[int]]:
    rows, _, seq, _ = query.shape
    if query.is_meta or isinstance(query, FakeTensor):  # only shapes are needed
        return ([seq] for _ in range(rows))
    if documents is not None:
        return ([n for n in row if n] for row in documents.tolist())
    if position_ids is None or position_ids.shape != (rows, seq):
        return ([seq] for _ in range(rows))
    return (_between([n for n, p in enumerate(row) if p == 0 and n], seq) for row in position_ids.tolist())


def _between(starts: list[int], end: int) -> list[int]:
    return [b - a for a, b in zip([0, *starts], [*starts, end], strict=True)]


def _attend_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One document: (heads, length, width), (key heads, length, width) twice -> (heads, length, width)."""
    length = query.shape[1]
    shared = query.shape[0] != key.shape[0]
    if softcap is not None:
        return _capped(query, key, value, scaling, dropout, window, softcap)
    mask = None if window is None or length <= window else _band(length, window, query.device)
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None, dropout_p=dropout,
        scale=scaling, enable_gqa=shared,
    )[0]  # fmt: skip


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Whether a token (rows) sees another (columns): (length, length)."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    heads, length, width = query.shape
    shared = heads // key.shape[0]
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    scores = query @ key.transpose(1, 2) * (width**-0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_band(length, window, query.device), float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


def _varlen_takes(query: torch.Tensor, value: torch.Tensor, dropout: float, softcap: float | None) -> bool:
    """Whether torch's flash attention, which `varlen_attn` calls, supports these.

    Its heads have at most 256 entries (Gemma 4 has 512), in eights, and as many in values as in queries
    (DeepSeek 3 has fewer).
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    width = query.shape[3]
    fits = width == value.shape[3] and width <= _WIDEST and width % 8 == 0
    return query.is_cuda and half and fits and dropout == 0.0 and softcap is None and _has_flash()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_flash() -> bool:
    """Whether the GPU, if there is one, has flash attention: those older than Ampere, such as T4, do not."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """All documents of all rows in one kernel, padding counting as one more; does not wait for the GPU."""
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, seq, _ = query.shape
    rest = seq - documents.sum(1, keepdim=True)
    ends = torch.cat([documents, rest], dim=1).flatten().cumsum(0, dtype=torch.int32)
    bounds = F.pad(ends, (1, 0))
    flat_query, flat_key, flat_value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out = varlen_attn(
        flat_query, flat_key, flat_value, bounds, bounds, seq, seq, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=heads != key.shape[1],
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out.view(rows, seq, heads, -1)


def forget_padding(config: Any) -> None:
    """Remove the padding token from a config: some models look for it among the tokens of a batch."""
    with contextlib.suppress(StrictDataclassFieldValidationError):  # ModernBERT's decoder must have one
        config.pad_token_id = None


AttentionInterface.register(NAME, attend)  # without a mask function, so that transformers creates no mask
