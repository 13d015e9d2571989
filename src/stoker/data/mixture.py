"""Several datasets combined, each with its share of the samples.

The order consists of blocks: in each block, every dataset has the number of samples that its weight
prescribes, rounded by largest remainders, at places given by a keyed permutation. So the shares hold at any
position, and the sample at a position is computed from the position alone. Each dataset goes through all its
samples, in its own order, before it starts again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from stoker.data import order
from stoker.data.order import Positions, fold, permute
from stoker.errors import BadInput

BLOCK = 1024
"""Samples over which the shares hold."""

_PLACES, _PARTS = 21, 22  # salts: for the places in a block, and for each dataset's own order


class Mixture:
    """Several datasets as one endless dataset with its own order.

    Args:
        parts: datasets like `PackedDataset`, or with their own order like `Stream`.
        weights: the share of samples of each, before they are divided by their sum; all above 0.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.shares = [weight / math.fsum(weights) for weight in weights]
        self._quotas = np.array(quotas(self.shares, BLOCK))
        self._begins = np.cumsum(self._quotas) - self._quotas

    def __len__(self) -> int:
        """Samples of all parts, the length of an epoch; in an epoch, a part may repeat or be incomplete."""
        return sum(len(part) for part in self.parts)

    @property
    def passes(self) -> list[float]:
        """How many times an epoch goes through each part."""
        return [share * len(self) / len(part) for share, part in zip(self.shares, self.parts, strict=True)]

    @property
    def tokens_per_sample(self) -> float:
        """The mean number of real tokens per row."""
        return float(np.average([part.tokens_per_sample for part in self.parts], weights=self.shares))

    @property
    def labelled(self) -> float:
        """The share of the tokens that have a label."""
        return float(np.average([part.labelled for part in self.parts], weights=self._tokens))

    @property
    def context(self) -> float:
        """The mean number of tokens of its own piece that a token sees, including itself."""
        return float(np.average([part.context for part in self.parts], weights=self._tokens))

    @property
    def _tokens(self) -> list[float]:
        return [share * part.tokens_per_sample for share, part in zip(self.shares, self.parts, strict=True)]

    def order(self, seed: int, positions: Positions) -> tuple[Positions, Positions]:
        """The epoch within its part, and the index, of the samples at positions, both (n,)."""
        blocks, within = np.divmod(positions, BLOCK)
        slots = permute(within, BLOCK, fold(seed, _PLACES, blocks))
        members = np.searchsorted(np.cumsum(self._quotas), slots, side="right")
        own = blocks * self._quotas[members] + slots - self._begins[members]
        epochs, indices = np.empty_like(positions), np.empty_like(positions)
        for number, part in enumerate(self.parts):
            those = np.flatnonzero(members == number)
            if those.size:
                epochs[those], found = order.order_of(part, self._seed(seed, number), own[those])
                indices[those] = found * len(self.parts) + number
        return epochs, indices

    def place(self, seed: int, position: int) -> list[Any]:
        """What `go_to` needs to find a position, and everything after it, again."""
        begins = position // BLOCK * self._quotas
        return [
            order.place_of(part, self._seed(seed, number), begin)
            for number, (part, begin) in enumerate(zip(self.parts, begins.tolist(), strict=True))
        ]

    def knows(self, place: Any) -> bool:
        """Whether a place is one in a mixture of as many parts, each of the same kind."""
        known = isinstance(place, list) and len(place) == len(self.parts)
        return known and all(map(order.knows, self.parts, place))

    def go_to(self, place: Sequence[Any]) -> None:
        """Continue the parts' own orders from a place."""
        for part, own in zip(self.parts, place, strict=True):
            order.go_to(part, own)

    def part(self, seed: int, share: float) -> Mixture:
        """Not supported, since the weights decide how often each part occurs. Raises BadInput."""
        raise BadInput(
            f"data_share={share:g} does not work with a mixture: shorten training with max_steps instead"
        )

    def _seed(self, seed: int, number: int) -> int:
        return int(fold(seed, _PARTS, number)[0])

    def __getitem__(self, index: int) -> Any:
        """A sample of a part, by its index as `order` returns it."""
        own, number = divmod(index, len(self.parts))
        return self.parts[number][own]

    def read(self, index: int, key: int) -> Any:
        """A sample, read by its part."""
        own, number = divmod(index, len(self.parts))
        return self.parts[number].read(own, key)


def quotas(shares: Sequence[float], size: int) -> list[int]:
    """Whole numbers with this sum, as close to the shares as possible (largest remainders).

    Each is at least 1, unless there are more shares than the sum.
    """
    exact = [share * size for share in shares]
    found = [max(1, math.floor(value)) for value in exact]
    while sum(found) != size:
        step = 1 if sum(found) < size else -1
        changeable = [n for n in range(len(found)) if step > 0 or found[n] > 1]
        found[max(changeable, key=lambda n: step * (exact[n] - found[n]))] += step
    return found
