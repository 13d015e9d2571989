"""What every source of labelled images has, and how labels become classes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from stoker.words import counted

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".jpe", ".jfif", ".avif", ".jp2",
    ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
"""Files that are read as images."""

Numbers = NDArray[np.int64]

_GAPS, _FEW = 10, 1000  # a numeric label below so many times their number, or below this, counts from 0


@dataclass(frozen=True)
class Columns:
    """The names of the columns with the image and with its label."""

    image: str = "image"
    label: str = "label"


IMAGE_AND_LABEL = Columns()


class Source(Protocol):
    """Where images are: `raw` reads the bytes (or the picture) of one."""

    labels: Numbers
    classes: tuple[str, ...]
    given: dict[str, Numbers]
    """The splits that the source itself has, by name; empty if it has none."""
    fingerprint: str
    left_out: tuple[str, ...]
    """What of the data is not used, for messages."""

    def raw(self, index: int) -> bytes | Image.Image:
        """The file's bytes, or a decoded picture."""
        ...

    def place(self, index: int) -> str:
        """The location of the image, for messages."""
        ...

    def names(self) -> Iterable[str]:
        """What identifies each image within the data, wherever the others are; decides its split."""
        ...


def given(splits: Sequence[str]) -> dict[str, Numbers]:
    """The images of each split, by the split of each image; none if it is the same for all."""
    if len(set(splits)) < 2:
        return {}
    of = np.array(splits)
    return {name: np.flatnonzero(of == name).astype(np.int64) for name in sorted(set(splits))}


def classes_of(names: Sequence[str]) -> tuple[str, ...]:
    """Labels in order: numeric labels from 0 to the highest; otherwise by name.

    Numbers of which most are missing are not counted from 0, but identify something.
    """
    if not all(name.isdecimal() for name in names):
        return in_order(names)
    numbers = sorted(set(map(int, names)))
    is_counted = numbers[-1] < max(_GAPS * len(numbers), _FEW)
    return tuple(map(str, range(numbers[-1] + 1) if is_counted else numbers))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The different names: numbers by size, others by name."""
    different = set(names)
    are_numbers = all(name.isdecimal() for name in different)
    return tuple(sorted(different, key=lambda name: (int(name) if are_numbers else 0, name)))


def numbered(names: Sequence[str], classes: Sequence[str]) -> Numbers:
    """The number of each label's class."""
    number = {name: n for n, name in enumerate(classes)}
    return np.array(
        [number[str(int(name)) if name.isdecimal() and name not in number else name] for name in names],
        dtype=np.int64,
    )


def digest(*parts: bytes) -> str:
    """SHA-256 of several contents."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()


def by_ending(files: Sequence[Path]) -> tuple[str, ...]:
    """Files that are not used, for `left_out`: `3 files (2 .txt, 1 .csv)`."""
    if not files:
        return ()
    counts = Counter(file.suffix.lower() or file.name for file in files).most_common(5)
    kinds = ", ".join(f"{count:,} {ending}" for ending, count in counts)
    return (f"{counted(len(files), 'file')} ({kinds})",)
