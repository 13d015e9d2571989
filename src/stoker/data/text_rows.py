"""Labelled texts as tokens: tokenised once, memory-mapped, and batched with texts of similar length.

The arrays are in the cache, in a folder named by a fingerprint of everything they depend on, shortest text
first. A batch is padded to its longest text, so the order of an epoch puts texts of similar length into the
same batch: within each stretch of a few batches of the shuffled epoch, texts are sorted by length, and these
batches are shuffled. Like the shuffle itself (see `order`), this is computed from the position alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stoker import storage
from stoker.data import cached, order
from stoker.data.labelled import Text, Texts
from stoker.data.order import Positions

FORMAT = 2
"""Part of the fingerprint: increase it when the arrays' contents for the same input change."""

_AT_ONCE = 4096  # texts that are tokenised together


class TextRows:
    """Tokenised texts with their labels, shortest first; opened by `tokenise`.

    Args:
        folder: in the cache.
        batch_size: the loader's batch size, for which texts of similar length are grouped.
        members: the numbers of the texts to use, ascending; default: all.
    """

    def __init__(self, folder: Path, batch_size: int, members: Positions | None = None) -> None:
        self._folder, self._batch_size, self._members = folder, batch_size, members
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._bounds = np.load(folder / "bounds.npy", mmap_mode="r")
        self._labels = np.load(folder / "labels.npy", mmap_mode="r")
        self.truncated = int(np.load(folder / "truncated.npy"))
        """The number of texts that were longer."""

    def __reduce__(self) -> tuple[type[TextRows], tuple[Any, ...]]:
        # A worker maps the files itself, and copies nothing.
        return TextRows, (self._folder, self._batch_size, self._members)

    def __len__(self) -> int:
        return len(self._labels) if self._members is None else len(self._members)

    @property
    def tokens_per_sample(self) -> float:
        """The mean number of tokens of all texts."""
        return len(self._tokens) / len(self._labels)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest text."""
        return int(np.diff(self._bounds[-2:])[0])

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], int]:
        """The tokens of a text, (tokens,), and the number of its label."""
        if not 0 <= index < len(self._labels):
            raise IndexError(f"text {index} of {len(self._labels)}")
        begin, end = self._bounds[index : index + 2]
        return self._tokens[begin:end].astype(np.int64), int(self._labels[index])

    def read(self, index: int, key: int) -> tuple[NDArray[np.int64], int]:
        """A text, which does not depend on the key: nothing about it is random."""
        return self[index]

    def order(self, seed: int, positions: Positions) -> tuple[Positions, Positions]:
        """The epoch and the index of the texts at positions, both (n,)."""
        sizes = range(len(self))
        epochs, indices = order.by_length(sizes, seed, positions, batch_size=self._batch_size)
        return epochs, indices if self._members is None else self._members[indices]

    def place(self, seed: int, position: int) -> None:
        """None: the order is a function of the position."""

    def knows(self, place: Any) -> bool:
        """Whether it is None."""
        return place is None

    def go_to(self, place: Any) -> None:
        """Nothing to do."""

    def part(self, seed: int, share: float) -> TextRows:
        """A share of the texts, drawn with a seed."""
        size = len(self._labels)
        members = np.sort(order.drawn(seed, np.arange(max(1, round(size * share))), size))
        return TextRows(self._folder, self._batch_size, members)


def collate(rows: Sequence[tuple[NDArray[np.int64], int]], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Texts padded to the longest: `input_ids`, `attention_mask`: (texts, tokens); `labels`: (texts,)."""
    longest = max(len(tokens) for tokens, _ in rows)
    input_ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for number, (tokens, _) in enumerate(rows):
        input_ids[number, : len(tokens)] = tokens
        mask[number, : len(tokens)] = 1
    return {
        "input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask),
        "labels": torch.tensor([label for _, label in rows]),
    }  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """The tokenised texts of each split."""

    train: TextRows
    validation: TextRows
    test: TextRows


def tokenise(
    texts: Texts,
    *,
    classes: Sequence[str],
    tokenizer: Any,
    max_length: int,
    batch_size: int,
    fingerprint: str,
) -> Rows:
    """Tokenise the texts of all splits, or open the result of an earlier call with the same fingerprint.

    Args:
        classes: the labels in order.
        tokenizer: a transformers tokenizer; adds the special tokens at the beginning and end of a text.
        max_length: the number of tokens to which texts are truncated.
        batch_size: see `TextRows`.
        fingerprint: of everything that determines how a text is tokenised.

    Raises:
        BadInput: the cache is not writable.
    """

    of_all = (FORMAT, texts.fingerprint, tuple(classes), fingerprint, max_length)

    def of(name: str, part: Sequence[Text]) -> TextRows:
        folder = storage.cache_folder() / "texts" / cached.name(*of_all, name)

        def fill(made: Path) -> None:
            _write(made, _arrays(part, classes, tokenizer, max_length))

        return cached.opened(folder, fill, lambda made: TextRows(made, batch_size))

    return Rows(of("train", texts.train), of("validation", texts.validation), of("test", texts.test))


def _write(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays into a new folder."""
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        storage.sync_file(folder / f"{name}.npy")


def _arrays(
    texts: Sequence[Text], classes: Sequence[str], tokenizer: Any, max_length: int
) -> Mapping[str, NDArray[Any]]:
    """All tokens concatenated, the start of each text (texts + 1,), and its label; shortest text first.

    Also the number of texts that were truncated.
    """
    number = {name: n for n, name in enumerate(classes)}
    encoded, truncated = _encoded(texts, tokenizer, max_length)
    lengths = np.array([len(tokens) for tokens in encoded])
    by_length = np.argsort(lengths, kind="stable")
    return {
        "tokens": np.concatenate([encoded[n] for n in by_length]),
        "bounds": np.concatenate([[0], np.cumsum(lengths[by_length])]),
        "labels": np.array([number[texts[n].label] for n in by_length]),
        "truncated": np.array(truncated),
    }


def _encoded(texts: Sequence[Text], tokenizer: Any, max_length: int) -> tuple[list[NDArray[np.int32]], int]:
    """The tokens of each text, and the number of texts that were truncated."""
    encoded: list[NDArray[np.int32]] = []
    truncated = 0
    for begin in range(0, len(texts), _AT_ONCE):
        some = [text.text for text in texts[begin : begin + _AT_ONCE]]
        found = tokenizer(some, truncation=True, max_length=max_length, return_attention_mask=False)
        encoded += [np.array(ids, dtype=np.int32) for ids in found["input_ids"]]
        if tokenizer.is_fast:
            truncated += sum(bool(encoding.overflowing) for encoding in found.encodings)
        else:
            pairs = zip(some, found["input_ids"], strict=True)
            full = [text for text, ids in pairs if len(ids) >= max_length]
            whole = tokenizer(full, return_attention_mask=False, verbose=False)["input_ids"] if full else []
            truncated += sum(len(ids) > max_length for ids in whole)
    return encoded, truncated
