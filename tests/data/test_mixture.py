"""Several datasets as one: their shares, each of their samples, and the same order from anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stoker.data.loader import Loader
from stoker.data.mixture import BLOCK, Mixture, quotas
from stoker.data.order import order_of
from stoker.world import World


class Numbers:
    """Samples that say where they are from."""

    tokens_per_sample = 8.0

    def __init__(self, name: int, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.name, index

    def read(self, index: int, key: int) -> tuple[int, int]:
        return self[index]


def samples(mixture: Mixture, begin: int, end: int, seed: int = 3) -> list[tuple[int, int]]:
    _, indices = order_of(mixture, seed, np.arange(begin, end))
    return [mixture[index] for index in indices.tolist()]


def test_each_dataset_has_its_share_of_every_block() -> None:
    mixture = Mixture([Numbers(0, 50), Numbers(1, 5000), Numbers(2, 300)], [3, 1, 1])
    for block in range(3):
        names = [name for name, _ in samples(mixture, block * BLOCK, (block + 1) * BLOCK)]
        assert [names.count(n) for n in range(3)] == quotas([0.6, 0.2, 0.2], BLOCK) == [614, 205, 205]


def test_a_dataset_begins_anew_only_when_all_of_it_was_seen() -> None:
    mixture = Mixture([Numbers(0, 37), Numbers(1, 100_000)], [1, 1])
    seen = [index for name, index in samples(mixture, 0, 4 * BLOCK) if name == 0]
    assert len(seen) == 2 * BLOCK
    counts = np.bincount(seen, minlength=37)
    assert counts.max() - counts.min() <= 1
    epochs, indices = order_of(mixture, 3, np.arange(4 * BLOCK))
    whole = indices[(epochs == 1) & (indices % 2 == 0)].tolist()
    assert len(set(whole)) == len(whole) == 37


def test_the_order_is_the_same_from_any_position_and_another_for_another_seed() -> None:
    mixture = Mixture([Numbers(0, 37), Numbers(1, 400)], [1, 2])
    all_of_them = samples(mixture, 0, 3000)
    assert samples(mixture, 1234, 1300) == all_of_them[1234:1300]
    assert samples(mixture, 0, 3000, seed=4) != all_of_them


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_share_the_batches_of_one_order(ranks: int) -> None:
    mixture = Mixture([Numbers(0, 37), Numbers(1, 400)], [1, 2])

    def share(rank: int) -> list[Any]:
        world = World(rank, ranks, rank, ranks)
        batches = Loader(mixture, batch_size=8, world=world, seed=3, collate=list).batches(16)
        return [next(batches) for _ in range(5)]

    shares = [share(rank) for rank in range(ranks)]
    joined = [sample for step in range(5) for rank in range(ranks) for sample in shares[rank][step]]
    assert joined == samples(mixture, 16, 56)


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=20))
def test_quotas_sum_up_and_are_near_the_shares(weights: list[float]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    found = quotas(shares, 1024)
    assert sum(found) == 1024
    assert min(found) >= 1
    assert all(abs(n - share * 1024) < 1 + len(shares) / 2 for n, share in zip(found, shares, strict=True))


def test_an_epoch_counts_all_samples_and_tokens_are_weighted() -> None:
    short, long = Numbers(0, 10), Numbers(1, 30)
    short.tokens_per_sample = 2.0
    mixture = Mixture([short, long], [3, 1])
    assert len(mixture) == 40
    assert mixture.tokens_per_sample == pytest.approx(0.75 * 2 + 0.25 * 8)
