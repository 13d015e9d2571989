"""Documents as rows of tokens: tokenised once, packed with their boundaries kept, memory-mapped.

Documents are cut into pieces of at most a row's length, and the pieces are packed into rows
by best fit, longest first. A row's positions restart at each piece, which is what keeps
attention from crossing from one document to the next, and no label asks a piece's first token
of the piece before it. The arrays stand in the cache in a folder named by a fingerprint of
all they depend on, and appear there by a rename: whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from stoker import storage
from stoker.data.documents import Document
from stoker.errors import BadInput

if TYPE_CHECKING:
    import torch

FORMAT = 2
"""Part of the fingerprint: raise it when the arrays, or what they hold for the same input, change."""

NO_LOSS = -100
"""The label of a token that nothing has to predict, as torch's cross-entropy and transformers have it."""

_MULTIPLE = 64  # tokens: rows that are trimmed have few lengths
_BATCH = 1024  # documents handed to the tokenizer at once
_LOCK_TIMEOUT = 24 * 3600.0  # seconds to wait for another process that is tokenising the same


class Encoded(NamedTuple):
    """A document as tokens."""

    ids: Sequence[int]
    has_loss: Sequence[bool] | None
    """Which tokens are to be predicted; None: all, as of a plain text, which may be cut into pieces."""


Encode = Callable[[Sequence[Document]], Iterable[Encoded]]


@dataclass(frozen=True)
class Statistics:
    """What became of the documents."""

    rows: int
    tokens: int
    """Real tokens, without padding."""
    loss_tokens: int
    """Tokens that have a label."""
    truncated: int
    """Pairs and conversations that were cut off at the end of a row."""
    dropped: int
    """Those of which nothing to be predicted is left then."""
    efficiency: float
    """Real tokens among all tokens of all rows."""


class PackedDataset:
    """Rows of packed documents; opened by `tokenise`, or by `open` from a folder of the cache."""

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

    def __reduce__(self) -> tuple[type[PackedDataset], tuple[Path]]:
        return PackedDataset, (self.folder,)  # a worker maps the files itself, and copies nothing

    def __len__(self) -> int:
        return self.statistics.rows

    @property
    def tokens_per_sample(self) -> float:
        """The mean number of real tokens in a row."""
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
        """How many tokens of its own piece a token sees, in the mean, with itself."""
        lengths = np.diff(self._pieces).astype(np.float64)
        return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        """A row: `input_ids`, `labels` and `position_ids`, each int64 (sequence_length,), and `documents`.

        Labels stand at the place of the token itself (the loss shifts them by one), and are
        NO_LOSS for padding, prompts, and the first token of each piece. Positions restart at
        0 with each piece, padding being one more. Documents are the lengths of the pieces, int64.
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
        """A row, which is the same whatever the key: nothing of it is random."""
        return self[index]


def collate(
    rows: Sequence[dict[str, NDArray[np.int64]]], *, trimmed: bool = False
) -> dict[str, torch.Tensor]:
    """Rows of a `PackedDataset` as a batch: each (rows, sequence_length), and `documents` (rows, most).

    Zeros stand behind a row's documents; `most` is rounded up to a power of two, so that batches have few
    shapes.

    Args:
        trimmed: leave out the padding behind the longest row, but for that up to a multiple of 64.
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
) -> PackedDataset:
    """Tokenise and pack documents, or open what an earlier call with the same fingerprint made.

    Args:
        encode: the tokens of each document, with all that begins and ends it.
        pad_id: pads rows; never predicted, whatever else it stands for.
        vocab_size: one more than the largest token id; decides the width of what is stored.
        sequence_length: tokens in a row, at least 2.
        fingerprint: all that decides what is packed, as values with a stable repr: of the
            corpus, the split and its fractions, the tokenizer.
        cache: the folder the arrays are kept in, see `cache_folder`.
        packing: whether documents share rows; else each piece has a row of its own.

    Raises:
        BadInput: the sequence is too short, no tokens are left, or the cache cannot be written.
    """
    if sequence_length < 2:
        raise BadInput(
            f"sequence_length={sequence_length}: it must be at least 2, as each token predicts the next"
        )
    parts = (FORMAT, sequence_length, pad_id, vocab_size, packing, *fingerprint)
    folder = cache / hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def make() -> None:
        pieces = _Pieces(sequence_length, vocab_size, documents, encode)
        if not pieces.tokens:
            raise BadInput(
                f"no tokens are left of {len(documents)} documents ({pieces.dropped} have nothing to be "
                f"predicted among their first {sequence_length} tokens): raise sequence_length, or give "
                "other data"
            )
        _write(folder, pieces, pad_id, packing)

    return PackedDataset(once(folder, make))


def once(folder: Path, make: Callable[[], None], lock: Path | None = None) -> Path:
    """A folder of the cache, made by one of those who ask for it. Raises BadInput where it cannot be.

    Args:
        lock: a file, held while it is made; by default one beside the folder.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with storage.locked(lock or folder.with_name(f"{folder.name}.lock"), _LOCK_TIMEOUT):
            if not folder.exists():
                make()
    except OSError as error:
        raise BadInput(
            f"the cache {folder.parent} cannot be written ({error.strerror}): "
            "set STOKER_CACHE to another folder"
        ) from error
    return folder


def _smallest_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class _Pieces:
    """Documents as pieces of at most a row's length."""

    def __init__(
        self, sequence_length: int, vocab_size: int, documents: Sequence[Document], encode: Encode
    ) -> None:
        self.sequence_length, self.dtype = sequence_length, _smallest_type(vocab_size)
        self.tokens: list[NDArray[np.unsignedinteger]] = []  # a piece each
        self.has_loss: list[NDArray[np.bool_]] = []
        self.truncated = self.dropped = 0
        for start in range(0, len(documents), _BATCH):
            for ids, has_loss in encode(documents[start : start + _BATCH]):
                self._add(ids, has_loss)

    def _add(self, ids: Sequence[int], predicted: Sequence[bool] | None) -> None:
        tokens: NDArray[np.unsignedinteger] = np.array(ids, dtype=self.dtype)
        length = self.sequence_length
        if predicted is None:
            for start in range(0, len(tokens), length):
                piece = tokens[start : start + length]
                if len(piece) > 1:  # the last token of a cut document may stand alone: nothing to learn
                    self._append(piece, np.ones(len(piece), dtype=np.bool_))
            return
        has_loss = np.array(predicted, dtype=np.bool_)[:length]
        if has_loss[1:].any():
            self.truncated += len(tokens) > length
            self._append(tokens[:length], has_loss)
        elif any(predicted):
            self.dropped += 1

    def _append(self, tokens: NDArray[np.unsignedinteger], has_loss: NDArray[np.bool_]) -> None:
        has_loss[0] = False  # no token of another document predicts the first
        self.tokens.append(tokens)
        self.has_loss.append(has_loss)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing.

    Longest first, each piece goes to the row with the least room that still takes it.
    Rows are found by the room they have left, so it takes n log n, not n times the rows.

    Returns:
        The indices of the pieces of each row. The same for the same lengths.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some row has room r
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[piece]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(piece)
        else:
            room, row = capacity, len(rows)
            rows.append([piece])
        left = room - length
        by_room[left].append(row)
        rooms |= 1 << left
    return rows


def write(
    documents: Sequence[Document],
    folder: Path,
    *,
    encode: Encode,
    pad_id: int,
    vocab_size: int,
    sequence_length: int,
    packing: bool,
) -> None:
    """Tokenise and pack documents into a folder that is not there yet; see `tokenise`. May be of no rows."""
    _write(folder, _Pieces(sequence_length, vocab_size, documents, encode), pad_id, packing)


def _write(folder: Path, pieces: _Pieces, pad_id: int, packing: bool) -> None:
    lengths = [len(tokens) for tokens in pieces.tokens]
    rows = pack(lengths, pieces.sequence_length) if packing else [[piece] for piece in range(len(lengths))]
    placed = [piece for row in rows for piece in row]
    none = np.empty(0, pieces.dtype)
    tokens = np.concatenate([none, *(pieces.tokens[piece] for piece in placed)])
    bounds = _bounds(len(pieces.tokens[piece]) for piece in placed)
    has_loss = np.concatenate([none.astype(np.bool_), *(pieces.has_loss[piece] for piece in placed)])
    statistics = Statistics(
        rows=len(rows),
        tokens=len(tokens),
        loss_tokens=int(has_loss.sum()),
        truncated=pieces.truncated,
        dropped=pieces.dropped,
        efficiency=len(tokens) / max(1, len(rows) * pieces.sequence_length),
    )
    meta = {
        "format": FORMAT,
        "sequence_length": pieces.sequence_length,
        "pad_id": pad_id,
        "statistics": asdict(statistics),
    }
    arrays = {"tokens": tokens, "has_loss": has_loss, "pieces": bounds, "rows": _bounds(map(len, rows))}
    _publish(folder, arrays, meta)


def _bounds(lengths: Iterable[int]) -> NDArray[np.int64]:
    """Where each of consecutive parts begins, and where the last one ends: (n + 1,)."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def _publish(folder: Path, arrays: dict[str, NDArray[np.generic]], meta: dict[str, object]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")  # under the lock: only a killed process left one
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
            storage.sync_file(temporary / f"{name}.npy")
        storage.write_atomically(temporary / "meta.json", json.dumps(meta).encode())
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    storage.sync_directory(folder.parent)
