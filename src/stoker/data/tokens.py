"""Documents as rows of tokens: tokenised once, packed with their boundaries kept, memory-mapped.

Documents are cut into pieces of at most a row's length, and the pieces are packed into rows by best fit,
longest first. Position ids restart at each piece, which keeps attention from crossing documents, and no
label asks the previous piece to predict a piece's first token. The arrays are in the cache, in a folder
named by a fingerprint of everything they depend on, and appear there with a rename: completely or not at all.

Documents are encoded in batches, by several processes if there are many (see `encoding`), and their tokens
are written to disk as they come; only the length of each piece stays in memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from stoker import storage
from stoker.data import cached, encoding
from stoker.data.documents import Document
from stoker.data.encoding import Encode, Part
from stoker.errors import BadInput
from stoker.words import counted

if TYPE_CHECKING:
    import torch

FORMAT = 9
"""Part of the fingerprint: increase it when the arrays, or their contents for the same input, change."""

NO_LOSS = -100
"""The label of a token that is not predicted, as in torch's cross-entropy and transformers."""

_MULTIPLE = 64  # tokens: trimmed rows have few different lengths
_GATHERED = 4096  # pieces that are copied at once


@dataclass(frozen=True)
class Statistics:
    """What happened to the documents."""

    documents: int
    """Those that have any tokens."""
    rows: int
    tokens: int
    """Real tokens, without padding."""
    loss_tokens: int
    """Tokens that have a label."""
    truncated: int
    """Pairs and conversations that were cut off at the end of a row."""
    dropped: int
    """Those of which nothing to predict was left."""
    unfound: int
    """Those in which nothing to predict was found at all."""
    unfound_turns: int
    """Turns to predict that were not found in the others."""
    efficiency: float
    """Real tokens as a share of all tokens in all rows."""


class PackedDataset:
    """Rows of packed documents; opened by `tokenise`, or by `open` from a cache folder."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.folder = folder
        self.sequence_length: int = meta["sequence_length"]
        self.statistics = Statistics(**meta["statistics"])
        self._pad_id: int = meta["pad_id"]
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._has_loss = np.load(folder / "has_loss.npy", mmap_mode="r")
        self._pieces = np.load(folder / "pieces.npy", mmap_mode="r")
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")
        (folder / "lengths.npy").stat()  # which is read when it is needed

    @property
    def lengths(self) -> NDArray[np.int32]:
        """The number of tokens of each document before it was cut: (documents,)."""
        found: NDArray[np.int32] = np.load(self.folder / "lengths.npy")
        return found

    def __reduce__(self) -> tuple[type[PackedDataset], tuple[Path]]:
        return PackedDataset, (self.folder,)  # a worker maps the files itself, and copies nothing

    def __len__(self) -> int:
        return self.statistics.rows

    @property
    def tokens_per_sample(self) -> float:
        """The mean number of real tokens per row."""
        return self.statistics.tokens / self.statistics.rows

    @property
    def loss_tokens(self) -> int:
        """The number of tokens that have a label, over all rows."""
        return self.statistics.loss_tokens

    @property
    def labelled(self) -> float:
        """The share of the tokens that have a label."""
        return self.statistics.loss_tokens / self.statistics.tokens

    @property
    def context(self) -> float:
        """The mean number of tokens of its own piece that a token sees, including itself."""
        lengths = np.diff(self._pieces).astype(np.float64)
        return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        """A row: `input_ids`, `labels` and `position_ids`, each int64 (sequence_length,), and `documents`.

        Labels are at the position of the token itself (the loss shifts them by one), and are NO_LOSS for
        padding, prompts, and the first token of each piece. Position ids restart at 0 with each piece,
        padding counting as one more piece. Documents are the lengths of the pieces, int64.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first, last = int(self._rows[index]), int(self._rows[index + 1])
        bounds = self._pieces[first : last + 1].astype(np.int64)
        real = slice(0, int(bounds[-1] - bounds[0]))
        input_ids = np.full(self.sequence_length, self._pad_id, dtype=np.int64)
        labels = np.full(self.sequence_length, NO_LOSS, dtype=np.int64)
        input_ids[real] = self._tokens[bounds[0] : bounds[-1]]
        has_loss = self._has_loss[bounds[0] : bounds[-1]]
        labels[real] = np.where(has_loss, input_ids[real], NO_LOSS)
        starts = np.append(bounds[:-1] - bounds[0], real.stop)
        lengths = np.diff(np.append(starts, self.sequence_length))
        position_ids = np.arange(self.sequence_length) - np.repeat(starts, lengths)
        return {
            "input_ids": input_ids, "labels": labels, "position_ids": position_ids,
            "documents": np.diff(bounds),
        }  # fmt: skip

    def read(self, index: int, key: int) -> dict[str, NDArray[np.int64]]:
        """A row, which does not depend on the key: nothing about it is random."""
        return self[index]


def collate(
    rows: Sequence[dict[str, NDArray[np.int64]]], *, trimmed: bool = False
) -> dict[str, torch.Tensor]:
    """Rows of a `PackedDataset` as a batch: each (rows, sequence_length), and `documents` (rows, most).

    A row's documents are followed by zeros; `most` is rounded up to a power of two, so that batches have few
    different shapes.

    Args:
        trimmed: remove padding beyond the longest row, except up to a multiple of 64.
    """
    import torch

    if trimmed:
        longest = max(int(row["documents"].sum()) for row in rows)
        kept = -(-longest // _MULTIPLE) * _MULTIPLE
        rows = [
            {name: array if name == "documents" else array[:kept] for name, array in row.items()}
            for row in rows
        ]

    most = max(len(row["documents"]) for row in rows)
    documents = np.zeros((len(rows), 1 << (most - 1).bit_length()), dtype=np.int64)
    for place, row in zip(documents, rows, strict=True):
        place[: len(row["documents"])] = row["documents"]
    joined = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "documents"}
    return {name: torch.from_numpy(array) for name, array in {**joined, "documents": documents}.items()}


class NothingLeft(BadInput):
    """Nothing can be learnt from any document.

    Args:
        documents: the number of documents.
        dropped, unfound: as in the statistics.
    """

    def __init__(self, documents: int, dropped: int, unfound: int, sequence_length: int) -> None:
        self.unfound = unfound
        super().__init__(
            f"no tokens are left of {counted(documents, 'document')} ({dropped} have nothing to predict in "
            f"their first {sequence_length} tokens, {unfound} nothing at all): "
            f"{'increase sequence_length, or ' if dropped else ''}use different data"
        )


def tokenise(
    documents: Sequence[Document],
    *,
    encode: Encode,
    pad_id: int,
    vocab_size: int,
    sequence_length: int,
    fingerprint: tuple[object, ...],
    cache: Path,
    packing: bool = True,
    workers: int | None = None,
) -> PackedDataset:
    """Tokenise and pack documents, or open the result of an earlier call with the same fingerprint.

    Args:
        encode: returns the tokens of each document, including special tokens. Is pickled if several
            processes encode.
        pad_id: pads rows; never predicted, whatever else it is used for.
        vocab_size: one more than the largest token id; decides the width of the stored integers.
        sequence_length: tokens per row, at least 2.
        fingerprint: everything that determines the result, as values with a stable repr: the corpus, the
            split and its fractions, the tokenizer.
        cache: the folder for the arrays.
        packing: whether documents share rows; otherwise each piece has its own row.
        workers: processes that encode, 1 being this one; default: as many as the size of the corpus is
            worth. Any number makes the same arrays.

    Raises:
        NothingLeft: no tokens are left.
        BadInput: the sequence is too short, or the cache is not writable.
    """
    if sequence_length < 2:
        raise BadInput(
            f"sequence_length={sequence_length}: must be at least 2, since each token predicts the next"
        )
    parts = (FORMAT, sequence_length, pad_id, vocab_size, packing, *fingerprint)
    folder = cache / cached.name(*parts)

    def fill(made: Path) -> None:
        write(
            documents, made, encode=encode, pad_id=pad_id, vocab_size=vocab_size,
            sequence_length=sequence_length, packing=packing, workers=workers, may_be_empty=False,
        )  # fmt: skip

    return cached.opened(folder, fill, PackedDataset)


def _smallest_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write(
    documents: Sequence[Document],
    folder: Path,
    *,
    encode: Encode,
    pad_id: int,
    vocab_size: int,
    sequence_length: int,
    packing: bool,
    workers: int | None = 1,
    may_be_empty: bool = True,
) -> None:
    """Tokenise and pack documents into a new folder; see `tokenise`.

    Args:
        may_be_empty: whether no rows are allowed; otherwise BadInput is raised.
    """
    folder.mkdir()
    cut = functools.partial(_cut, encode=encode, length=sequence_length, dtype=_smallest_type(vocab_size))
    with contextlib.closing(encoding.parts(documents, cut, workers)) as parts:
        pieces = _encode(parts, folder, _smallest_type(vocab_size))
    if not (len(pieces.lengths) or may_be_empty):
        raise NothingLeft(len(documents), pieces.dropped, pieces.unfound, sequence_length)
    statistics = _place(pieces, folder, sequence_length, packing)
    meta = {
        "format": FORMAT, "sequence_length": sequence_length, "pad_id": pad_id,
        "statistics": asdict(statistics),
    }  # fmt: skip
    storage.write_atomically(folder / "meta.json", json.dumps(meta).encode())


def _cut(
    documents: Sequence[Document], *, encode: Encode, length: int, dtype: type[np.unsignedinteger[Any]]
) -> Part:
    """Documents as pieces of at most `length` tokens."""
    tokens, has_loss = [np.empty(0, dtype)], [np.empty(0, np.bool_)]
    sizes: list[int] = []
    pieces: list[int] = []
    truncated = dropped = unfound = unfound_turns = 0
    for ids, predicted, turns in encode(documents):
        count = len(ids)
        sizes.append(count)
        if predicted is None:
            kept = count - (count % length == 1)  # a single token at the end has nothing to learn
            has_loss.append(np.ones(kept, np.bool_))
            pieces.extend(min(length, kept - begin) for begin in range(0, kept, length))
        else:
            kept = min(count, length)
            own = np.fromiter(predicted, np.bool_, count)
            if not own[1:].any():
                unfound += count > 0
                continue
            unfound_turns += turns
            if not own[1:kept].any():
                dropped += 1
                continue
            truncated += count > length
            has_loss.append(own[:kept])
            pieces.append(kept)
        tokens.append(np.fromiter(ids, dtype, count)[:kept])
    lengths = np.array(pieces, dtype=np.int32)
    joined = np.concatenate(has_loss)
    joined[_bounds(lengths)[:-1]] = False  # no token of another document predicts the first one
    joined_sizes = np.array(sizes, np.int32)
    return Part(
        np.concatenate(tokens), joined, lengths, joined_sizes, truncated, dropped, unfound, unfound_turns,
    )  # fmt: skip


def _encode(parts: Iterable[Part], folder: Path, dtype: type[np.unsignedinteger[Any]]) -> Part:
    """All parts combined in order, with their tokens on disk."""
    lengths, sizes = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    truncated = dropped = unfound = unfound_turns = 0
    with (folder / "encoded").open("wb") as tokens, (folder / "predicted").open("wb") as has_loss:
        for part in parts:
            tokens.write(part.tokens.data)
            has_loss.write(part.has_loss.data)
            lengths.append(part.lengths)
            sizes.append(part.sizes)
            truncated += part.truncated
            dropped += part.dropped
            unfound += part.unfound
            unfound_turns += part.unfound_turns
    return Part(
        _mapped(folder / "encoded", dtype), _mapped(folder / "predicted", np.bool_),
        np.concatenate(lengths), np.concatenate(sizes), truncated, dropped, unfound, unfound_turns,
    )  # fmt: skip


def _mapped(file: Path, dtype: type[np.generic]) -> NDArray[Any]:
    if not file.stat().st_size:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(file, dtype, mode="r"))


def _place(pieces: Part, folder: Path, sequence_length: int, packing: bool) -> Statistics:
    """Write the arrays, with the pieces in the order of their rows, replacing what was encoded."""
    count = len(pieces.lengths)
    if packing:
        placed, rows = pack(pieces.lengths, sequence_length)
    else:
        placed, rows = np.arange(count), np.ones(count, np.int64)
    bounds = _bounds(pieces.lengths[placed])
    begins = _bounds(pieces.lengths)[:-1][placed]
    _save(folder / "tokens.npy", pieces.tokens, begins, bounds)
    _save(folder / "has_loss.npy", pieces.has_loss, begins, bounds)
    for name, array in (("pieces", bounds), ("rows", _bounds(rows)), ("lengths", pieces.sizes)):
        np.save(folder / f"{name}.npy", array)
        storage.sync_file(folder / f"{name}.npy")
    statistics = Statistics(
        documents=int((pieces.sizes > 0).sum()),
        rows=len(rows),
        tokens=len(pieces.tokens),
        loss_tokens=int(np.count_nonzero(pieces.has_loss)),
        truncated=pieces.truncated,
        dropped=pieces.dropped,
        unfound=pieces.unfound,
        unfound_turns=pieces.unfound_turns,
        efficiency=len(pieces.tokens) / max(1, len(rows) * sequence_length),
    )
    (folder / "encoded").unlink()
    (folder / "predicted").unlink()
    return statistics


def _save(file: Path, source: NDArray[Any], begins: NDArray[np.int64], bounds: NDArray[np.int64]) -> None:
    """Reorder the pieces of an array into a file in `np.save` format, a few at a time to save memory.

    Args:
        begins: where each piece begins in the source: (pieces,).
        bounds: where it begins in the result, and where the last one ends: (pieces + 1,).
    """
    header = {"descr": np.lib.format.dtype_to_descr(source.dtype), "fortran_order": False}
    lengths = np.diff(bounds)
    with file.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, {**header, "shape": (int(bounds[-1]),)})
        for first in range(0, len(begins), _GATHERED):
            some = slice(first, first + _GATHERED)
            pairs = zip(begins[some].tolist(), lengths[some].tolist(), strict=True)
            out.write(np.concatenate([source[begin : begin + length] for begin, length in pairs]).data)
    storage.sync_file(file)


def pack(lengths: NDArray[np.int32], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best-fit-decreasing bin packing.

    Longest first, each piece goes to the row with the least room that still fits it.
    Rows are looked up by remaining room, so it takes n log n, not n times the number of rows.

    Returns:
        The indices of the pieces in the order of their rows, (pieces,), and the number of pieces per row,
        (rows,). The same for the same lengths.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set if some row has room r
    rows = 0
    for number, length in enumerate(lengths[longest_first].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, rows
            rows += 1
        row_of[number] = row
        left = room - length
        by_room[left].append(row)
        rooms |= 1 << left
    return longest_first[np.argsort(row_of, kind="stable")], np.bincount(row_of, minlength=rows)


def _bounds(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """The start of each consecutive part, and the end of the last one: (n + 1,)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
