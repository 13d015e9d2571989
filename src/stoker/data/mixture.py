"""Several datasets as one, each with its share of the samples.

The order is in blocks: of each block every dataset has the number of samples that its weight says, rounded
by the largest remainders, at places that are a keyed permutation. So the shares hold at any position, and
which sample stands there is computed from the position alone. Each dataset goes through all of its samples,
in an order of its own, before it begins anew.
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
"""Samples within which the shares are kept."""

_PLACES, _PARTS = 21, 22  # salts: of the places in a block, and of each dataset's own order


class Mixture:
    """Datasets as one, endless, in an order of its own.

    Args:
        parts: as `PackedDataset`, or with an order of its own as `Stream`.
        weights: what share of the samples each has, before they are divided by their sum; each above 0.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.shares = [weight / math.fsum(weights) for weight in weights]
        self._quotas = np.array(quotas(self.shares, BLOCK))
        self._begins = np.cumsum(self._quotas) - self._quotas

    def __len__(self) -> int:
        """Samples of all parts, which an epoch counts; some of a part may come again in it, or not at all."""
        return sum(len(part) for part in self.parts)

    @property
    def passes(self) -> list[float]:
        """How often an epoch goes through each part."""
        return [share * len(self) / len(part) for share, part in zip(self.shares, self.parts, strict=True)]

    @property
    def tokens_per_sample(self) -> float:
        """The mean number of real tokens in a row."""
        return float(np.average([part.tokens_per_sample for part in self.parts], weights=self.shares))

    @property
    def labelled(self) -> float:
        """The share of the tokens that have a label."""
        return float(np.average([part.labelled for part in self.parts], weights=self._tokens))

    @property
    def context(self) -> float:
        """How many tokens of its own piece a token sees, in the mean, with itself."""
        return float(np.average([part.context for part in self.parts], weights=self._tokens))

    @property
    def _tokens(self) -> list[float]:
        return [share * part.tokens_per_sample for share, part in zip(self.shares, self.parts, strict=True)]

    def order(self, seed: int, positions: Positions) -> tuple[Positions, Positions]:
        """The epoch of its part, and the index, of the samples at positions, both (n,)."""
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
        """What `go_to` needs to find a position again, and all behind it."""
        begins = position // BLOCK * self._quotas
        return [
            order.place_of(part, self._seed(seed, number), begin)
            for number, (part, begin) in enumerate(zip(self.parts, begins.tolist(), strict=True))
        ]

    def go_to(self, place: Sequence[Any]) -> None:
        """Take up the parts' own orders from a place on."""
        for part, own in zip(self.parts, place, strict=True):
            order.go_to(part, own)

    def part(self, seed: int, share: float) -> Mixture:
        """There is none: how often each part comes is said by the weights. Raises BadInput."""
        raise BadInput(
            f"data_share={share:g} does not work with a mixture: shorten training with max_steps instead"
        )

    def _seed(self, seed: int, number: int) -> int:
        return int(fold(seed, _PARTS, number)[0])

    def __getitem__(self, index: int) -> Any:
        """A sample of a part, by its index as `order` gives it."""
        own, number = divmod(index, len(self.parts))
        return self.parts[number][own]

    def read(self, index: int, key: int) -> Any:
        """A sample as the part reads it."""
        own, number = divmod(index, len(self.parts))
        return self.parts[number].read(own, key)


def quotas(shares: Sequence[float], size: int) -> list[int]:
    """Whole numbers of this sum, as near to the shares as they can be; the largest remainders are rounded up.

    Each is at least 1, where there are not more shares than the sum.
    """
    exact = [share * size for share in shares]
    found = [max(1, math.floor(value)) for value in exact]
    while sum(found) != size:
        step = 1 if sum(found) < size else -1
        changeable = [n for n in range(len(found)) if step > 0 or found[n] > 1]
        found[max(changeable, key=lambda n: step * (exact[n] - found[n]))] += step
    return found
