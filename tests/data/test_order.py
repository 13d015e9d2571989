"""The order of samples: a permutation, whatever is asked of it in whatever pieces."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stoker.data.order import by_length, order, permute

from support import SOAK

seeds = st.integers(-(2**63), 2**64)


@given(size=st.integers(1, 600), key=st.integers(0, 2**64 - 1))
def test_every_place_is_taken_exactly_once(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1023, 1024, 1025, 99_991])
def test_awkward_sizes_are_permuted_too(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, 7)), np.arange(size))


@given(seed=seeds, size=st.integers(1, 50), start=st.integers(0, 10**12), cut=st.integers(0, 40))
def test_a_slice_does_not_depend_on_how_it_is_cut(seed: int, size: int, start: int, cut: int) -> None:
    positions = np.arange(start, start + 40)
    whole = order(seed, size, positions)
    parts = order(seed, size, positions[:cut]), order(seed, size, positions[cut:])
    for row, first, second in zip(whole, *parts, strict=True):
        assert np.array_equal(row, np.concatenate([first, second]))


@given(seed=seeds, size=st.integers(1, 60))
def test_each_epoch_holds_each_sample_once(seed: int, size: int) -> None:
    epochs, indices = order(seed, size, np.arange(3 * size))
    assert epochs.tolist() == sorted([0, 1, 2] * size)
    for epoch in range(3):
        assert sorted(indices[epochs == epoch].tolist()) == list(range(size))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**63))
def test_epochs_and_seeds_have_different_orders(seed: int) -> None:
    _, indices = order(seed, 100, np.arange(300))
    _, other = order(seed + 1, 100, np.arange(100))
    orders = [tuple(indices[:100]), tuple(indices[100:200]), tuple(indices[200:]), tuple(other)]
    assert len(set(orders)) == 4


def test_the_first_order_stays_what_it_was() -> None:
    """A change here breaks the resuming of every run there is."""
    epochs, indices = order(1, 10, np.arange(5, 15))
    assert epochs.tolist() == [0] * 5 + [1] * 5
    assert indices.tolist() == [3, 1, 0, 2, 8, 7, 3, 6, 1, 0]


@pytest.mark.soak
@pytest.mark.parametrize("size", [2, 3, 4, 5] if SOAK else [2, 3, 4])
def test_permutations_of_few_places_are_about_equally_likely(size: int) -> None:
    kinds = math.factorial(size)
    draws = 2000 if SOAK else 30 * kinds
    counts = collections.Counter(tuple(permute(np.arange(size), size, key)) for key in range(draws))
    expected = draws / kinds
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == kinds
    assert chi_square < kinds - 1 + 4 * np.sqrt(2 * (kinds - 1))  # four standard deviations


@pytest.mark.soak
def test_every_place_goes_everywhere_about_equally_often() -> None:
    size, draws = 37, 1500 if SOAK else 300
    landed = np.zeros((size, size))
    for key in range(draws):
        landed[np.arange(size), permute(np.arange(size), size, key)] += 1
    expected = draws / size
    chi_square = ((landed - expected) ** 2 / expected).sum()
    degrees = (size - 1) ** 2
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)


def test_a_position_far_away_costs_no_more_than_the_first() -> None:
    epochs, indices = order(3, 10**9, np.arange(10**15, 10**15 + 4))
    assert epochs.tolist() == [10**6] * 4
    assert ((indices >= 0) & (indices < 10**9)).all()


@given(
    seed=seeds, size=st.integers(1, 200), batch=st.integers(1, 9), start=st.integers(0, 8),
    cut=st.integers(1, 199), share=st.booleans(),
)  # fmt: skip
def test_by_length_each_epoch_holds_each_sample_once_however_it_is_cut(
    seed: int, size: int, batch: int, start: int, cut: int, share: bool
) -> None:
    lengths = np.random.default_rng(size).integers(1, 50, 2 * size if share else size)

    def found(positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return by_length(lengths, seed, positions, batch_size=batch, size=size, start=start % batch)

    positions = np.arange(3 * size)
    epochs, indices = found(positions)
    assert np.array_equal(epochs, positions // size)
    whole, parts = (
        indices.reshape(3, size),
        np.concatenate([found(positions[:cut])[1], found(positions[cut:])[1]]),
    )
    assert np.array_equal(indices, parts)
    _, plain = order(seed, size, positions[:size])
    for epoch in whole:
        assert len(set(epoch.tolist())) == size
        assert set(epoch.tolist()) == set(whole[0].tolist())
    assert share or set(whole[0].tolist()) == set(plain.tolist())


@pytest.mark.parametrize("start", [0, 5])
def test_by_length_batches_have_little_padding_and_come_in_random_order(start: int) -> None:
    size, batch = 10_000, 16
    lengths = np.random.default_rng(0).lognormal(4, 0.7, size).astype(int)
    first = np.arange(start, start + size // batch * batch)

    def padded(indices: NDArray[np.int64]) -> float:
        batches = lengths[indices].reshape(-1, batch)
        return 1 - batches.sum() / (batches.max(1) * batch).sum()

    _, shuffled = order(3, size, first)
    _, grouped = by_length(lengths, 3, first, batch_size=batch, start=start)
    assert padded(shuffled) > 0.5
    assert padded(grouped) < 0.12
    longest = lengths[grouped].reshape(-1, batch).max(1)
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.15


def test_the_first_order_by_length_stays_what_it_was() -> None:
    """A change here breaks the resuming of every run there is."""
    lengths = np.array([5, 1, 4, 2, 3, 9, 8, 7, 6, 0])
    _, indices = by_length(lengths, 1, np.arange(20), batch_size=2)
    assert indices.tolist() == [9, 1, 8, 7, 6, 5, 2, 0, 3, 4, 8, 7, 3, 4, 2, 0, 6, 5, 9, 1]
