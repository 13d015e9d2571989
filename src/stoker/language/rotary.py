"""Rotary embeddings that treat long and short texts differently, by each document's own length.

LongRoPE (Ding et al. 2024, arXiv:2402.13753; Phi 3 and 4) has two sets of frequencies, one for texts longer
than those of its pretraining. transformers chooses one of the two for a whole batch, by the largest
position in it: a short document would be rotated like its longest neighbour.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def by_document(model: nn.Module) -> None:
    """Make a model's rotary embeddings choose their frequencies separately for each document in a row.

    A document begins at the start of a row, and wherever a position is 0.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            _choose(module)


def _choose(module: Any) -> None:
    plain = module.forward
    most = module.config.rope_parameters["original_max_position_embeddings"]

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each (rows, seq, width), for positions (rows, seq)."""
        as_short = plain(x, position_ids.clamp(max=most - 1))
        as_longest = plain(x, position_ids)
        is_long = _ends(position_ids)[..., None] >= most
        cosine, sine = (torch.where(is_long, b, a) for a, b in zip(as_short, as_longest, strict=True))
        return cosine, sine

    module.forward = forward


def _ends(position_ids: torch.Tensor) -> torch.Tensor:
    """The last position of each token's document: (rows, seq), like the positions."""
    document = (position_ids == 0).cumsum(-1)
    last = position_ids.new_zeros(position_ids.shape[0], position_ids.shape[1] + 1)
    return last.scatter_reduce(1, document, position_ids, "amax").gather(1, document)
