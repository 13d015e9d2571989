"""Images in WebDataset tar shards."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker import words
from stoker.data import image_source, labelled
from stoker.data.image_source import SUFFIXES, Numbers, Source
from stoker.errors import BadInput


@dataclass
class _Tars:
    """Members of tar shards, by the position of their bytes."""

    files: list[Path]
    members: list[tuple[int, int, int, str]]
    """File, offset, size and name."""
    labels: Numbers
    classes: tuple[str, ...]
    fingerprint: str
    given: dict[str, Numbers]
    left_out: tuple[str, ...]

    def raw(self, index: int) -> bytes:
        file, offset, size, _ = self.members[index]
        with self.files[file].open("rb") as opened:
            opened.seek(offset)
            return opened.read(size)

    def place(self, index: int) -> str:
        file, _, _, name = self.members[index]
        return f"{self.files[file]}, {name}"

    def names(self) -> list[str]:
        """Names, which are independent of the shard; with the shard if several have the same."""
        known = Counter(name for *_, name in self.members)
        return [
            name if known[name] == 1 else f"{self.files[file].name} {name}"
            for file, _, _, name in self.members
        ]


def read(files: Sequence[Path], columns: image_source.Columns, others: Sequence[Path]) -> Source:
    """The files of a sample are adjacent, and share everything before the first dot.

    Args:
        others: files next to them that are not read.

    Raises:
        BadInput: there are no images, one has no label, or a file is no tar file.
    """
    members, names, without = [], [], list[str]()
    splits = labelled.splits_of(files)
    for number, file in enumerate(files):
        for key, parts in _samples(file).items():
            image = next((p for suffix, p in parts.items() if f".{suffix.lower()}" in SUFFIXES), None)
            if image is None:
                without.append(f"{key.lstrip('/')} ({words.some(sorted(parts), 3)})")
                continue
            members.append((number, image.offset_data, image.size, image.name))
            names.append(_label(file, key, parts, columns.label))
    if not members:
        raise BadInput(f"{', '.join(map(str, files[:3]))}: no images found")
    classes = image_source.classes_of(names)
    listing = [f"{files[n].name} {offset} {size} {name}" for n, offset, size, name in members]
    about = "\n".join(listing).encode(errors="surrogateescape")
    found = image_source.digest(about, "\n".join(names).encode())
    given = image_source.given([splits[number] for number, *_ in members])
    return _Tars(
        list(files), members, image_source.numbered(names, classes), classes, found, given,
        (*image_source.by_ending(others), *_without_image(without)),
    )  # fmt: skip


def _without_image(samples: Sequence[str]) -> tuple[str, ...]:
    """Samples that are not used, for `left_out`, such as those whose names have a dot."""
    if not samples:
        return ()
    count = words.counted(len(samples), "sample")
    return (f"{count} without an image, such as {samples[0]}: a sample's name ends at its first dot",)


def _samples(file: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                folder, _, base = member.name.rpartition("/")
                key, dot, suffix = base.partition(".")
                if member.isfile() and dot:
                    found.setdefault(f"{folder}/{key}", {})[suffix] = member
    except tarfile.TarError as error:
        raise BadInput(f"{file} is not an uncompressed tar file: {error}") from error
    return found


def _label(file: Path, key: str, parts: dict[str, tarfile.TarInfo], column: str) -> str:
    with file.open("rb") as opened:
        for suffix in ("cls", "json"):
            if suffix in parts:
                opened.seek(parts[suffix].offset_data)
                text = opened.read(parts[suffix].size).decode(errors="replace").strip()
                where = f"{file}, {parts[suffix].name}"
                label = text if suffix == "cls" else _json_label(text, where, column)
                if label not in (None, ""):
                    return labelled.label_of(where, label, column)
    raise BadInput(f"{file}, {key.lstrip('/')} has no label: add {key.rpartition('/')[2]}.cls")


def _json_label(text: str, where: str, column: str) -> Any:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(found, dict):
        raise BadInput(f'{where}: must be a JSON object such as {{"{column}": ...}}')
    return found.get(column)
