"""Embeddings with sparse gradients, against plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import sparse_run
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ranks


def _plain(*, clips: bool = False, left_out: slice | None = None) -> dict[str, torch.Tensor]:
    """The same without stoker; samples of the first batch that do not use the embedding."""
    torch.manual_seed(0)
    model = sparse_run.Bags()
    bags, classes = sparse_run.dataset().tensors
    made: list[torch.optim.Optimizer] = [torch.optim.SGD(model.parameters(), 0.1)]
    if not clips:
        made = [
            torch.optim.SparseAdam(list(model.words.parameters()), 0.05),
            torch.optim.Adam(model.classes.parameters(), 0.01),
        ]
    for step in range(sparse_run.STEPS):
        part = slice(step * sparse_run.BATCH, (step + 1) * sparse_run.BATCH)
        weights = torch.ones(sparse_run.BATCH, 1)
        if left_out is not None and step == 0:
            weights[left_out] = 0
        seen = model.words(bags[part][weights[:, 0] > 0])
        inside = torch.zeros(sparse_run.BATCH, 4).index_add(0, weights[:, 0].nonzero()[:, 0], seen)
        cross_entropy(model.classes(inside), classes[part]).backward()
        if clips:
            _clip(model)
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _clip(model: nn.Module) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.to_dense().norm() for g in gradients]).norm()
    assert norm > sparse_run.LIMIT
    for gradient in gradients:
        gradient.mul_(sparse_run.LIMIT / (norm + 1e-6))


@pytest.mark.parametrize("size", [1, 2])
def test_a_loop_of_ones_own_trains_an_embedding_as_plain_torch(size: int, tmp_path: Path) -> None:
    trained = ranks.run(sparse_run.own_loop, size, tmp_path, tmp_path / "runs")
    for state in trained:
        torch.testing.assert_close(state, _plain())


def test_a_rank_that_uses_no_row_takes_part(tmp_path: Path) -> None:
    trained = ranks.run(sparse_run.own_loop, 2, tmp_path, tmp_path / "runs", alone=1)
    for state in trained:
        torch.testing.assert_close(state, _plain(left_out=slice(sparse_run.BATCH // 2, None)))


@pytest.mark.parametrize("size", [1, 2])
def test_sparse_gradients_are_clipped_with_the_others(size: int, tmp_path: Path) -> None:
    trained = ranks.run(sparse_run.clipped, size, tmp_path, tmp_path / "runs")
    for state in trained:
        torch.testing.assert_close(state, _plain(clips=True))
