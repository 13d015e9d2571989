"""The order of samples: a pure function of (seed, epoch, position), O(1) at any position.

An epoch is a keyed pseudo-random permutation of the dataset, computed element by element and
never stored, so that resuming at sample one billion costs no more than at sample zero, and
neither the world size nor the number of workers can change the order. The permutation is the
generalised Feistel cipher with cycle walking of Black & Rogaway 2002, "Ciphers with
Arbitrary Finite Domains", with splitmix64 as its round function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Positions: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]

_STRETCH = 32  # batches whose samples are sorted by length
_BATCHES = 31  # salt: for the order of batches in a stretch
_DRAWN = 2**32  # salt, beyond every epoch: which samples are drawn is independent of their order
_ROUNDS = 16  # with 8, the permutations of 5 or 6 places are visibly not equally likely
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 divided by the golden ratio
_MASK = 2**64 - 1


@runtime_checkable
class OrderedDataset(Protocol):
    """A dataset that defines its own endless order of samples."""

    def order(self, seed: int, positions: Positions, /) -> tuple[Positions, Positions]:
        """The epoch and the index of the samples at positions, both (n,)."""
        ...

    def place(self, seed: int, position: int, /) -> Any:
        """What `go_to` needs to find a position, and everything after it, again, as JSON types."""
        ...

    def knows(self, place: Any, /) -> bool:
        """Whether a saved place is one of such a dataset: the data may have changed since."""
        ...

    def go_to(self, place: Any, /) -> None:
        """Continue the order from a place that it knows."""
        ...

    def part(self, seed: int, share: float, /) -> Any:
        """The same dataset with only a share of its samples, chosen by `drawn`. Raises BadInput."""
        ...


def mix(words: Words) -> Words:
    """splitmix64's output function, elementwise: a bijection that spreads each bit over all bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def uniforms(key: int) -> Iterator[float]:
    """Numbers in [0, 1) that are a function of a key: splitmix64 (Steele, Lea & Flood 2014)."""
    while True:
        key = word = (key + _GOLDEN) & _MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
        yield ((word ^ (word >> 31)) >> 11) * 2.0**-53


def fold(key: int, *values: int | Positions) -> Words:
    """Hash a key with integers, or arrays of them, to 64-bit words: (n,), or (1,) for plain integers."""
    words = mix(np.array([(key + _GOLDEN) & _MASK], dtype=np.uint64))
    for value in values:
        part = np.atleast_1d(np.asarray(value)).astype(np.uint64)
        words = mix(words + (part + np.uint64(1)) * np.uint64(_GOLDEN))
    return words


def permute(positions: Positions, size: int, key: int | Words) -> Positions:
    """Where a keyed permutation of range(size) maps each position.

    Args:
        positions: (n,) in range(size).
        size: the number of places, at least 1.
        key: selects the permutation; one for all positions, or one for each, (n,).

    Returns:
        (n,) in range(size). Over all positions and one key, each place exactly once.
    """
    keys = key if isinstance(key, np.ndarray) else np.array([key & _MASK], dtype=np.uint64)
    keys = np.broadcast_to(keys, positions.shape)
    places = _encipher(positions.astype(np.uint64), size, keys)
    # Cycle walking: the cipher permutes a domain slightly larger than `size`; a value that lands outside is
    # encrypted again until it is inside. The domain exceeds `size` by less than its root, so few do.
    while (outside := np.flatnonzero(places >= size)).size:
        places[outside] = _encipher(places[outside], size, keys[outside])
    return places.astype(np.int64)


def _encipher(words: Words, size: int, keys: Words) -> Words:
    """One pass of the Feistel cipher over range(a * b), the smallest near-square domain >= size."""
    root = math.isqrt(size - 1) + 1
    a, b = np.uint64(root), np.uint64(-(-size // root))
    left, right = words % a, words // a
    for number in range(_ROUNDS):
        round_keys = keys + np.uint64((number + 1) * _GOLDEN & _MASK)
        modulus = a if number % 2 == 0 else b
        left, right = right, (left + mix(right + mix(round_keys)) % modulus) % modulus
    return right * a + left  # an even number of rounds leaves the halves in their original order


def order(seed: int, size: int, positions: Positions) -> tuple[Positions, Positions]:
    """The samples at some positions of the endless stream of shuffled epochs.

    Position p of the stream is place p % size of epoch p // size, so a batch can span two
    epochs and no sample is dropped.

    Args:
        positions: (n,)

    Returns:
        The epoch and the dataset index of each sample, both (n,).
    """
    epochs, places = np.divmod(positions, size)
    return epochs, permute(places, size, fold(seed, epochs))


def by_length(
    lengths: NDArray[Any] | range,
    seed: int,
    positions: Positions,
    *,
    batch_size: int,
    size: int | None = None,
    start: int = 0,
) -> tuple[Positions, Positions]:
    """As `order`, but each batch has samples of similar length, so that little of it is padding.

    Within each stretch of a few batches of the shuffled epoch, samples are sorted by length, as by
    transformers' `LengthGroupedSampler`, and these batches are shuffled. Like the shuffle, this is computed
    from the position alone.

    Args:
        lengths: of each sample, (samples,), in any unit; a range for samples that are sorted already.
        batch_size: samples per batch.
        size: use only this many samples, as in `order_of`.
        start: where a batch begins.
    """
    size = size or len(lengths)
    epochs = positions // size
    stretches = (positions - start) // (batch_size * _STRETCH)
    indices = np.empty_like(positions)
    for epoch, stretch in sorted(set(zip(epochs.tolist(), stretches.tolist(), strict=True))):
        first = max(epoch * size, stretch * batch_size * _STRETCH + start)
        within = np.arange(first, min((epoch + 1) * size, (stretch + 1) * batch_size * _STRETCH + start))
        _, shuffled = order(seed, size, within)
        if size < len(lengths):
            shuffled = drawn(seed, shuffled, len(lengths))
        batches = (within - start) // batch_size - (first - start) // batch_size
        count = int(batches[-1]) + 1
        turns = permute(np.arange(count), count, fold(seed, epoch, stretch, _BATCHES))
        by_size = shuffled if isinstance(lengths, range) else lengths[shuffled]
        found = np.empty_like(shuffled)
        found[np.argsort(turns[batches], kind="stable")] = shuffled[np.argsort(by_size, kind="stable")]
        here = (epochs == epoch) & (stretches == stretch)
        indices[here] = found[positions[here] - first]
    return epochs, indices


def order_of(
    dataset: Any, seed: int | None, positions: Positions, size: int | None = None
) -> tuple[Positions, Positions]:
    """The samples at some positions of a dataset's own order, if it has one; otherwise as `order`.

    Without a seed, a dataset without its own order is read in sequence.

    Args:
        size: use only this many samples, drawn with the seed; a smaller number is a subset of a larger one.
    """
    if isinstance(dataset, OrderedDataset):
        return dataset.order(seed or 0, positions)
    size = size or len(dataset)
    if seed is None:
        return np.divmod(positions, size)
    epochs, places = order(seed, size, positions)
    return epochs, drawn(seed, places, len(dataset)) if size < len(dataset) else places


def in_sequence(members: Positions, positions: Positions) -> tuple[Positions, Positions]:
    """The epoch and the index of samples at positions, of members that are read in their order, both (n,)."""
    epochs, places = np.divmod(positions, len(members))
    return epochs, members[places]


def drawn(seed: int, places: Positions, size: int) -> Positions:
    """The samples that a seed draws from `size` at places: (n,) in range(size), each once."""
    return permute(places, size, fold(seed, _DRAWN))


def place_of(dataset: Any, seed: int | None, position: int) -> Any:
    """What a dataset's `go_to` needs to find a position again; None if it has no order of its own."""
    return dataset.place(seed or 0, position) if isinstance(dataset, OrderedDataset) else None


def knows(dataset: Any, place: Any) -> bool:
    """Whether a place is what `place_of` returns for such a dataset."""
    return dataset.knows(place) if isinstance(dataset, OrderedDataset) else place is None


def go_to(dataset: Any, place: Any) -> None:
    """Make a dataset with its own order continue from a place that it knows."""
    if isinstance(dataset, OrderedDataset) and place is not None:
        dataset.go_to(place)
