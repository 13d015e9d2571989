"""Noise on the embeddings during training (NEFTune, Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def add(model: Any, alpha: float) -> None:
    """Make the embedding layer add uniform noise in training mode, up to alpha / sqrt(row length * width)."""
    if alpha == 0:
        return

    def noisy(module: nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor:
        """(rows, seq, width)."""
        if not module.training:
            return embedded
        most = alpha / math.sqrt(embedded.shape[1] * embedded.shape[2])
        return embedded + torch.empty_like(embedded).uniform_(-most, most)

    model.get_input_embeddings().register_forward_hook(noisy)
