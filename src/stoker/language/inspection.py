"""What training sees of its data: token rows, what is learnt of them, and the fate of the documents.

Nothing is tokenised here: it shows the rows that training reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from stoker.data import order
from stoker.data.mixture import Mixture
from stoker.data.stream import Stream
from stoker.data.tokens import NO_LOSS, PackedDataset
from stoker.language.rows import Rows
from tokenizers.decoders import DecodeStream

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

_BELOW, _ABOVE = 6, 4  # bars of a histogram on either side of a row's length, each covering twice the length


class Token(NamedTuple):
    """A token of a row."""

    id: int
    text: str
    """Empty if its bytes are part of a character, which is shown with its last token."""
    learnt: bool
    special: bool


@dataclass(frozen=True)
class Sample:
    """A row."""

    index: int
    """Its index among the rows of its source."""
    documents: list[list[Token]]
    padding: int
    """Tokens after the documents."""


@dataclass(frozen=True)
class Numbers:
    """What happened to the documents of a split."""

    documents: int
    rows: int
    tokens: int
    """Real tokens, without padding."""
    learnt: int
    truncated: int
    """Pairs and conversations that were cut off at the end of a row."""
    dropped: int
    """Those of which nothing to learn was left."""
    unfound: int
    """Those in which nothing to learn was found at all."""
    unfound_turns: int
    """Turns to learn that were not found in the others."""
    padding: float
    """The share of all positions in all rows that is padding."""
    quantiles: dict[str, int]
    """Quantiles of the documents' lengths in tokens, before they were cut."""
    longer: int
    """Documents with more tokens than a row."""
    histogram: list[tuple[int, int, int]]
    """Lower and upper limit in tokens, both inclusive, and the number of such documents."""


def parts_of(rows: Rows) -> list[PackedDataset | Stream]:
    """The training data, one part per source."""
    return rows.train.parts if isinstance(rows.train, Mixture) else [rows.train]


def packed(data: PackedDataset | Stream) -> list[PackedDataset]:
    """The tokenised data of a part; for a stream, what was sampled in advance."""
    return data.looked_at() if isinstance(data, Stream) else [data]


def numbers(found: Sequence[PackedDataset]) -> Numbers:
    """The numbers of all of these together; their rows have the same length."""
    statistics = [data.statistics for data in found]
    lengths = np.concatenate([data.lengths for data in found])
    lengths = np.sort(lengths[lengths > 0])
    row = found[0].sequence_length
    rows, tokens = sum(s.rows for s in statistics), sum(s.tokens for s in statistics)
    return Numbers(
        documents=len(lengths),
        rows=rows,
        tokens=tokens,
        learnt=sum(s.loss_tokens for s in statistics),
        truncated=sum(s.truncated for s in statistics),
        dropped=sum(s.dropped for s in statistics),
        unfound=sum(s.unfound for s in statistics),
        unfound_turns=sum(s.unfound_turns for s in statistics),
        padding=1 - tokens / max(1, rows * row),
        quantiles={f"{share:g}": int(lengths[round(share * (len(lengths) - 1))]) for share in QUANTILES},
        longer=int((lengths > row).sum()),
        histogram=_histogram(lengths, row),
    )


def _histogram(lengths: NDArray[np.int32], row: int) -> list[tuple[int, int, int]]:
    """Bars each covering twice the length, one ending at a row's length; without empty ones at either end."""
    ends = [row >> n for n in range(_BELOW, 0, -1) if row >> n] + [row << n for n in range(_ABOVE)]
    ends.append(max(int(lengths[-1]), ends[-1] + 1))
    begins = [1, *(end + 1 for end in ends[:-1])]
    counts = np.diff(np.searchsorted(lengths, [0, *ends], side="right")).tolist()
    bars = list(zip(begins, ends, counts, strict=True))
    filled = [number for number, (_, _, count) in enumerate(bars) if count]
    return bars[filled[0] : filled[-1] + 1]


def samples(found: Sequence[PackedDataset], tokenizer: Any, count: int, seed: int) -> list[Sample]:
    """Some rows: of one dataset, those that training on it alone starts with; of several, taken in turn."""
    made: list[Sample] = []
    filled = [data for data in found if len(data)]
    for turn in range(count):
        data, number = filled[turn % len(filled)], turn // len(filled)
        if number < len(data):
            _, indices = order.order(seed, len(data), np.array([number]))
            made.append(_sample(data, int(indices[0]), tokenizer))
    return made


def _sample(data: PackedDataset, index: int, tokenizer: Any) -> Sample:
    row = data[index]
    bounds = np.cumsum([0, *row["documents"]]).tolist()
    special = set(tokenizer.all_special_ids)
    documents = []
    for begin, end in itertools.pairwise(bounds):
        ids = row["input_ids"][begin:end].tolist()
        learnt = (row["labels"][begin:end] != NO_LOSS).tolist()
        texts = _texts(tokenizer, ids)
        documents.append([
            Token(token, text, predicted, token in special)
            for token, text, predicted in zip(ids, texts, learnt, strict=True)
        ])  # fmt: skip
    return Sample(index, documents, data.sequence_length - bounds[-1])


def _texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """What each token adds to the text."""
    if not tokenizer.is_fast:
        yield from (tokenizer.decode([token]) for token in ids)
        return
    stream = DecodeStream(skip_special_tokens=False)
    for token in ids:
        yield stream.step(tokenizer.backend_tokenizer, token) or ""
