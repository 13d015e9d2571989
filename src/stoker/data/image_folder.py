"""Images in folders: one per class, possibly below folders of the splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.data import image_source
from stoker.data.image_source import SUFFIXES, Numbers, Source
from stoker.data.labelled import SPLITS, is_hidden
from stoker.errors import BadInput
from stoker.words import some


@dataclass
class _Files:
    """Images in separate files."""

    folder: Path
    files: list[Path]
    labels: Numbers
    classes: tuple[str, ...]
    given: dict[str, Numbers]
    fingerprint: str
    left_out: tuple[str, ...]

    def raw(self, index: int) -> bytes:
        return self.files[index].read_bytes()

    def place(self, index: int) -> str:
        return str(self.files[index])

    def names(self) -> list[str]:
        return [file.relative_to(self.folder).as_posix() for file in self.files]


def are_classes(path: Path, files: Sequence[Path]) -> bool:
    """Whether files are images of classes rather than, say, the pictures of a readme."""
    return len({file.parent for file in files if file.parent != path}) > 1


def read(path: Path, files: Sequence[Path], others: Sequence[Path]) -> Source:
    """The images of a folder; fingerprinted by names and sizes.

    Args:
        others: files in it that are not read.

    Raises:
        BadInput: there are none, one has no label, or some folders are splits and others are not.
    """
    if not files:
        found = image_source.by_ending(others)
        raise BadInput(
            f"data={path} contains no images{f', but {found[0]}' if found else ''}: give images "
            f"({some(SUFFIXES)}) in one folder per class"
        )
    parts = [file.relative_to(path).parts for file in files]
    depth = 1 if _has_splits(path, parts) else 0
    _check_labelled(files, parts, depth)
    names = [p[depth] for p in parts]
    classes = image_source.in_order(names)
    given = image_source.given([SPLITS[p[0].lower()] for p in parts]) if depth else {}
    listing = "\n".join(f"{'/'.join(p)} {_size(file)}" for file, p in zip(files, parts, strict=True))
    left_out = (*image_source.by_ending(others), *_without_images(path, parts, depth))
    return _Files(
        path, list(files), image_source.numbered(names, classes), classes, given,
        image_source.digest(listing.encode(errors="surrogateescape")), left_out,
    )  # fmt: skip


def _has_splits(path: Path, parts: Sequence[tuple[str, ...]]) -> bool:
    """Whether the topmost folders are splits. Raises BadInput if only some are."""
    tops = {p[0] for p in parts if len(p) > 1}
    splits = sorted(top for top in tops if top.lower() in SPLITS)
    others = sorted(tops.difference(splits))
    have_classes = any(len(p) > 2 for p in parts if p[0] in splits)
    if splits and others and have_classes:
        raise BadInput(
            f"{path} has the folders {some(splits)}, which are named as splits, next to {some(others)}: if "
            f"{splits[0]} is a split, move {others[0]} elsewhere; if it is a class, move all classes into "
            f"{path / 'train'}"
        )
    return bool(splits) and not others and (len(splits) > 1 or all(len(p) > 2 for p in parts))


def _check_labelled(files: Sequence[Path], parts: Sequence[tuple[str, ...]], depth: int) -> None:
    for file, p in zip(files, parts, strict=True):
        if len(p) >= depth + 2:
            continue
        is_split = depth == 1 and len(p) == 2 and SPLITS[p[0].lower()] != "train"
        leave = f"; images without labels cannot be measured on: move {p[0]} elsewhere" if is_split else ""
        raise BadInput(f"{file} has no label: images must be in one folder per class{leave}")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:  # such as a link to nothing
        raise BadInput(f"{file} cannot be read ({error.strerror}): restore or remove it") from error


def _without_images(path: Path, parts: Sequence[tuple[str, ...]], depth: int) -> tuple[str, ...]:
    """Folders that would be classes if they contained images."""
    have = {path.joinpath(*p[: depth + 1]) for p in parts}
    roots = {path.joinpath(*p[:depth]) for p in parts}
    empty = [
        folder.relative_to(path).as_posix()
        for root in sorted(roots)
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not is_hidden(folder.name) and folder not in have
    ]
    return (f"the folders without images {some(empty)}, which are no classes",) if empty else ()
