"""Rows of documents that are tokenised and packed during training.

This is for data that is too large to tokenise in advance. It is divided into chunks (see `chunks`), whose
order in each epoch is a keyed permutation; several consecutive chunks form a group, whose rows are permuted
again. The number of rows of a chunk is known only once it is tokenised. So a position is found by counting
through the groups from the last known one, which is saved in checkpoints (`place`), and resuming costs the
same at any position. Tokenised chunks are in the cache, named by their content and not by the order; ranks
and runs share them, and only the newest ones of a dataset are kept.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from stoker import storage
from stoker.data import cached, tokens
from stoker.data.chunks import Chunks
from stoker.data.documents import place
from stoker.data.encoding import Encode
from stoker.data.order import Positions, fold, order, permute
from stoker.data.tokens import NothingLeft, PackedDataset
from stoker.errors import BadInput, StokerError

T = TypeVar("T")

GROUP = 8
"""Chunks whose rows are shuffled together."""

_KEPT = 16 * GROUP  # tokenised chunks on disk
_OPEN = 2 * GROUP  # of these, open in a process
_ROWS = 2**32  # more rows than a chunk can have
_CHUNKS, _WITHIN = 11, 12  # salts: for the order of the chunks, and for the rows of a group


class _Group(NamedTuple):
    """Chunks whose rows are shuffled together."""

    begin: int
    end: int
    """The end of its rows among all rows."""
    epochs: Positions
    chunks: Positions
    sizes: Positions
    """Rows of each chunk; like the two fields above, (GROUP,)."""

    @property
    def ends(self) -> Positions:
        """Where the rows of each chunk end within the group."""
        return np.cumsum(self.sizes)


class Stream:
    """Rows like those of a `PackedDataset`, endless, in their own order.

    Args:
        chunks: where the documents are.
        held_out: documents whose place (see `documents.place`) is below this are not trained on.
        encode, pad_id, vocab_size, sequence_length, packing: see `tokens.tokenise`.
        fingerprint: of the data and of `encode`.
        cache: the folder for tokenised chunks.
        sampled: chunks from which the lengths of an epoch and of a row are estimated.
    """

    def __init__(
        self,
        chunks: Chunks,
        *,
        held_out: float,
        encode: Encode,
        pad_id: int,
        vocab_size: int,
        sequence_length: int,
        packing: bool,
        fingerprint: tuple[object, ...],
        cache: Path,
        sampled: Sequence[int],
    ) -> None:
        self.chunks, self.held_out = chunks, held_out
        self.sequence_length = sequence_length
        self._settings: dict[str, Any] = {
            "encode": encode, "pad_id": pad_id, "vocab_size": vocab_size,
            "sequence_length": sequence_length, "packing": packing,
        }  # fmt: skip
        parts = (tokens.FORMAT, held_out, pad_id, vocab_size, sequence_length, packing, *fingerprint)
        self._cache = cache / f"stream-{cached.name(*parts)}"
        self._sampled = list(sampled)
        self._opened: dict[int, PackedDataset] = {}
        self._first, self._begin = 0, 0  # a group, and the number of rows before it
        self._groups: list[_Group] = []  # from the first one on
        self._estimate(self.looked_at())

    def __getstate__(self) -> dict[str, Any]:
        """The state for a loader worker, which opens the chunks that it reads itself."""
        return {**self.__dict__, "_opened": {}, "_groups": []}

    def looked_at(self) -> list[PackedDataset]:
        """The chunks that estimates are based on."""
        return [self._open(number) for number in self._sampled]

    def _estimate(self, found: Sequence[PackedDataset]) -> None:
        lost = [chunk.statistics for chunk in found if not len(chunk)]
        looked_at, found = len(found), [chunk for chunk in found if len(chunk)]
        if not found and (documents := sum(each.documents for each in lost)):
            dropped, unfound = sum(each.dropped for each in lost), sum(each.unfound for each in lost)
            raise NothingLeft(documents, dropped, unfound, self.sequence_length)
        if not found:
            raise BadInput(f"{self.chunks.where}: looked at {looked_at} parts, and none contains text")
        rows = sum(len(chunk) for chunk in found)
        weights = [chunk.statistics.tokens for chunk in found]
        self._length = max(1, round(rows / looked_at * len(self.chunks)))
        self.tokens_per_sample = sum(weights) / rows
        self.labelled = float(np.average([chunk.labelled for chunk in found], weights=weights))
        self.context = float(np.average([chunk.context for chunk in found], weights=weights))

    def __len__(self) -> int:
        """The approximate number of rows in an epoch, estimated from the sampled chunks."""
        return self._length

    def order(self, seed: int, positions: Positions) -> tuple[Positions, Positions]:
        """The epoch and the index of the rows at positions, both (n,)."""
        if positions.min() < self._begin:
            self._go_to(0, 0)
        while self._end <= positions.max():
            self._add_group(seed)
        epochs, indices = np.empty_like(positions), np.empty_like(positions)
        found = np.searchsorted([group.end for group in self._groups], positions, side="right")
        for known in np.unique(found).tolist():
            group, those = self._groups[known], found == known
            key = fold(seed, _WITHIN, self._first + known)
            rows = permute(positions[those] - group.begin, group.end - group.begin, key)
            members = np.searchsorted(group.ends, rows, side="right")
            epochs[those] = group.epochs[members]
            indices[those] = group.chunks[members] * _ROWS + rows - (group.ends - group.sizes)[members]
        return epochs, indices

    @property
    def _end(self) -> int:
        return self._groups[-1].end if self._groups else self._begin

    def _add_group(self, seed: int) -> None:
        number = self._first + len(self._groups)
        epochs, chunks = self._members(seed, number)
        sizes = np.array([len(self._open(chunk)) for chunk in chunks.tolist()])
        self._groups.append(_Group(self._end, self._end + int(sizes.sum()), epochs, chunks, sizes))
        self._prepare(self._members(seed, number + 1)[1].tolist())
        self._clear()

    def _members(self, seed: int, group: int) -> tuple[Positions, Positions]:
        """The epochs and the chunks of a group, both (GROUP,)."""
        return order(fold(seed, _CHUNKS).item(), len(self.chunks), group * GROUP + np.arange(GROUP))

    def place(self, seed: int, position: int) -> dict[str, int]:
        """What `go_to` needs to find a position, and everything after it, again."""
        self.order(seed, np.array([position]))
        known = bisect_right([group.end for group in self._groups], position)
        return {"group": self._first + known, "rows": self._groups[known].begin}

    def knows(self, place: Any) -> bool:
        """Whether a place is one in a stream."""
        return isinstance(place, dict) and place.keys() == {"group", "rows"}

    def go_to(self, place: dict[str, int]) -> None:
        """Continue counting from a saved place."""
        self._go_to(place["group"], place["rows"])

    def part(self, seed: int, share: float) -> Stream:
        """Not supported, since the samples are not known in advance. Raises BadInput."""
        raise BadInput(
            f"data_share={share:g} does not work with a stream: shorten training with max_steps instead"
        )

    def _go_to(self, group: int, rows: int) -> None:
        self._first, self._begin = group, rows
        self._groups = []

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        """A row by its index, as `order` returns it; in the format of a `PackedDataset`."""
        chunk, row = divmod(index, _ROWS)
        return self._open(chunk)[row]

    def read(self, index: int, key: int) -> dict[str, NDArray[np.int64]]:
        """A row, which does not depend on the key: nothing about it is random."""
        return self[index]

    # -- tokenised chunks ---------------------------------------------------------------------

    def _open(self, chunk: int) -> PackedDataset:
        found = self._opened.pop(chunk) if chunk in self._opened else self._opened_anew(chunk)
        self._opened[chunk] = found  # the last one used is the last one closed
        while len(self._opened) > _OPEN:
            del self._opened[next(iter(self._opened))]
        return found

    def _opened_anew(self, chunk: int) -> PackedDataset:
        def opening(folder: Path) -> PackedDataset:
            os.utime(folder)
            return PackedDataset(folder)

        return self._tokenised(chunk, opening)

    def _tokenised(self, chunk: int, opening: Callable[[Path], T]) -> T:
        folder, lock = self._cache / str(chunk), self._cache / "lock"
        return cached.opened(folder, lambda made: self._make(chunk, made), opening, lock)

    def _make(self, chunk: int, folder: Path) -> None:
        read = self.chunks.kept if chunk in self._sampled else self.chunks.documents
        documents = [d for d in read(chunk) if place(d.key) >= self.held_out and not d.lacking]
        tokens.write(documents, folder, **self._settings)

    def _prepare(self, chunks: Sequence[int]) -> None:
        """Tokenise chunks in the background."""

        def work() -> None:
            with contextlib.suppress(StokerError):  # the error occurs again when the chunk is needed
                for chunk in chunks:
                    self._tokenised(chunk, os.utime)

        threading.Thread(target=work, name="tokenise-ahead", daemon=True).start()

    def _clear(self) -> None:
        """Remove the least recently used chunks."""
        made = sorted(
            (folder for folder in self._cache.iterdir() if folder.name.isdecimal()),
            key=storage.modified,
            reverse=True,
        )
        for folder in made[_KEPT:]:
            with contextlib.suppress(FileNotFoundError):  # another run was faster
                folder.rename(self._cache / f".{uuid.uuid4().hex[:12]}.gone")
        for gone in self._cache.glob(".*.gone"):  # also what a killed process had begun to remove
            shutil.rmtree(gone, ignore_errors=True)
