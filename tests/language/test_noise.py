"""Noise on embeddings is there while training alone, as large as it was asked for."""

from __future__ import annotations

import math

import pytest
import torch
from stoker.language import noise

import families


def test_noise_is_uniform_up_to_its_bound_and_only_while_training() -> None:
    model = families.model("llama")
    plain = model.get_input_embeddings().weight.detach()
    noise.add(model, 5.0)
    ids = torch.arange(2, 66).view(2, 32)  # (rows, seq)
    model.eval()
    assert torch.equal(model.get_input_embeddings()(ids), plain[ids])
    model.train()
    first, second = ((model.get_input_embeddings()(ids) - plain[ids]).detach() for _ in range(2))
    most = 5.0 / math.sqrt(32 * plain.shape[1])
    assert not torch.equal(first, second)
    assert first.abs().max() <= most * 1.0001
    assert first.std() == pytest.approx(most / math.sqrt(3), rel=0.05)


def test_none_is_none() -> None:
    model = families.model("llama")
    noise.add(model, 0.0)
    assert not model.get_input_embeddings()._forward_hooks
