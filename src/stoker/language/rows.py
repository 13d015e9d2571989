"""The rows of tokens that a language model is trained and evaluated on."""

from __future__ import annotations

from dataclasses import dataclass

from stoker.data.mixture import Mixture
from stoker.data.stream import Stream
from stoker.data.tokens import PackedDataset


@dataclass(frozen=True)
class Rows:
    """Rows of tokens for each split."""

    train: PackedDataset | Stream | Mixture
    validation: dict[str, PackedDataset]
    """By source name."""
    test: dict[str, PackedDataset]
    encoding: str
    """The fingerprint of the tokenisation."""
