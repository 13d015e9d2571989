"""Labelled images: folders, Parquet files, WebDataset tar shards, and scikit-learn's digits.

A source only knows where each image is: opening it reads names, headers and labels, and each image is
read separately, so that resuming in the middle of an epoch costs no more than starting. Only Parquet,
which cannot be read row by row, is copied once, into the cache. Decoding runs in the loader's workers.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from stoker import storage
from stoker.data import parquet
from stoker.data.documents import place
from stoker.data.labelled import SPLITS, split_of
from stoker.errors import BadInput

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")

Numbers = NDArray[np.int64]

_GAPS, _FEW = 10, 1000  # a numeric label below so many times their number, or below this, counts from 0


class Source(Protocol):
    """Where images are: `raw` reads the bytes (or the picture) of one."""

    labels: Numbers
    classes: tuple[str, ...]
    given: dict[str, Numbers]
    """The splits that the source itself has, by name; empty if it has none."""
    fingerprint: str
    keys: Sequence[str]
    """What identifies each image within the data, wherever the others are; decides its split."""

    def raw(self, index: int) -> bytes | Image.Image:
        """The file's bytes, or a decoded picture."""
        ...

    def place(self, index: int) -> str:
        """The location of the image, for messages."""
        ...


def read(reference: str) -> Source:
    """The images of `digits`, a folder, a .parquet or .tar file, or a folder of these.

    A folder of images has one subfolder per class; there can be `train`, `val` and `test` folders above
    these, and files can be in such folders or have such names (`train-00000.parquet`). Parquet files have an
    `image` column, bytes or a struct with `bytes`, and a `label` column; a split of a hub dataset whose
    labels are withheld (all -1) is left out. Samples of a tar shard are `KEY.jpg` (or another image type)
    with `KEY.cls`, or `KEY.json` with a "label".

    Raises:
        BadInput: there are no images, or one has no label.
    """
    if reference == "digits":
        return _digits()
    path = Path(reference).expanduser()
    if not path.exists():
        raise BadInput(f"data={reference} does not exist: give digits, a folder, a .parquet or a .tar file")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for suffix, make in ((".tar", _tars), (".parquet", _parquets)):
        chosen = [file for file in files if file.suffix == suffix]
        if chosen:
            return make(chosen)
    return _folder(path, [file for file in files if file.suffix.lower() in SUFFIXES])


def picture(source: Source, index: int) -> Image.Image:
    """A decoded image. Raises BadInput, naming its location, if it cannot be read."""
    found = source.raw(index)
    if isinstance(found, Image.Image):
        return found
    try:
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(found)))  # by its orientation tag
        return _in_eight_bits(upright).convert("RGB")
    except UnidentifiedImageError as error:  # its message contains only a memory address
        raise BadInput(
            f"{source.place(index)} is not a readable image: its {len(found):,} bytes are in no format that "
            "Pillow supports; fix or remove it"
        ) from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{source.place(index)} is not a readable image: {error}") from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """An image whose grey has 16 bits, with the upper 8, as Pillow reads colours of 16 bits.

    Converted by Pillow, all but the darkest of its 65,536 greys would be white.
    """
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Splits:
    """The samples of each split, as indices of the source's images."""

    train: Numbers
    validation: Numbers
    test: Numbers


def split(source: Source, *, validation: float, test: float, seed: int = 0) -> Splits:
    """The source's own splits; missing ones are held out from the images to train on.

    Which images are held out depends on the seed and on each image's own key, so that no other image changes
    its split if some are added or removed.

    Args:
        validation: share of the images held out during training, if the source has no `val` folder.
        test: likewise for the final test.

    Raises:
        BadInput: a split would be empty.
    """
    held = dict(source.given)
    if held and "train" not in held:
        raise BadInput(f"there is no train split to train on: the data has {' and '.join(held)}")
    everything = held.get("train", np.arange(len(source.labels), dtype=np.int64))
    shares = {name: share for name, share in (("validation", validation), ("test", test)) if name not in held}
    places = np.array([place(f"{seed} {source.keys[number]}") for number in everything.tolist()])
    held |= {name: everything[those] for name, those in _held_out(places, source.labels[everything], shares)}
    if min(len(held[name]) for name in ("train", "validation", "test")) == 0:
        raise BadInput(f"{len(source.labels)} images are too few for training, validation and test")
    return Splits(held["train"], held["validation"], held["test"])


def _held_out(
    places: NDArray[np.float64], labels: Numbers, shares: Mapping[str, float]
) -> Iterator[tuple[str, Numbers]]:
    """The images of "train" and of parts of about these shares, by their places in [0, 1).

    The lowest places are for validation, the highest for the test. Of each class an image stays in train;
    a part that would be empty gets the image that is next to it and can be spared.
    """
    edges = {name: share if name == "validation" else 1 - share for name, share in shares.items()}
    part = np.full(len(places), "train", dtype="<U10")
    for name, edge in edges.items():
        part[places < edge if name == "validation" else places >= edge] = name
    for label in np.setdiff1d(labels, labels[part == "train"]):
        those = np.flatnonzero(labels == label)
        part[those[np.argmin(abs(places[those] - 0.5))]] = "train"
    for name, edge in edges.items():
        if (part == name).any():
            continue
        left = np.flatnonzero(part == "train")
        spare = left[np.bincount(labels[left])[labels[left]] > 1]
        if spare.size == 0 and (part != "train").sum() > 1:
            spare = np.flatnonzero(part != "train")
        part[spare[np.argsort(abs(places[spare] - edge))[:1]]] = name
    return ((name, np.flatnonzero(part == name)) for name in ("train", *shares))


class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Images as tensors: `pixel_values` (channels, size, size), float32, and `labels`, a whole number."""

    def __init__(
        self,
        source: Source,
        numbers: Sequence[int] | Numbers,
        transform: Callable[[Image.Image, int], torch.Tensor],
    ) -> None:
        self._source, self._numbers, self._transform = source, numbers, transform

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.read(index, random.getrandbits(64))

    def read(self, index: int, key: int) -> dict[str, torch.Tensor]:
        """A sample, augmented as a function of the key."""
        number = int(self._numbers[index])
        pixels = self._transform(picture(self._source, number), key)
        return {"pixel_values": pixels, "labels": torch.tensor(int(self._source.labels[number]))}


@dataclass
class _Pictures:
    """Images held in memory."""

    pixels: NDArray[np.uint8]  # (images, height, width)
    labels: Numbers
    classes: tuple[str, ...]
    fingerprint: str
    keys: Sequence[str]
    given: dict[str, Numbers] = field(default_factory=dict)

    def raw(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def place(self, index: int) -> str:
        return f"digit {index}"


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadInput("data=digits needs scikit-learn: pip install 'stoker[examples]'") from error
    found = load_digits()
    pixels = (found.images * (255 / 16)).round().astype(np.uint8)
    classes = tuple(str(name) for name in found.target_names)
    fingerprint = _hash(pixels.tobytes(), found.target.tobytes())
    return _Pictures(
        pixels, found.target.astype(np.int64), classes, fingerprint, [str(n) for n in range(len(pixels))]
    )


@dataclass
class _Files:
    """Images in separate files."""

    files: list[Path]
    labels: Numbers
    classes: tuple[str, ...]
    given: dict[str, Numbers]
    fingerprint: str
    keys: Sequence[str]

    def raw(self, index: int) -> bytes:
        return self.files[index].read_bytes()

    def place(self, index: int) -> str:
        return str(self.files[index])


def _folder(path: Path, files: list[Path]) -> Source:
    """One folder per class, possibly below `train`, `val` and `test`; fingerprinted by names and sizes."""
    if not files:
        raise BadInput(f"data={path} contains no images: give {', '.join(SUFFIXES)} in one folder per class")
    parts = [file.relative_to(path).parts for file in files]
    tops = {p[0] for p in parts}
    has_splits = tops <= set(SPLITS) and (len(tops) > 1 or all(len(p) > 2 for p in parts))
    depth = 1 if has_splits else 0
    loose = next((file for file, p in zip(files, parts, strict=True) if len(p) < depth + 2), None)
    if loose is not None:
        raise BadInput(f"{loose} has no label: images must be in one folder per class")
    names = [p[depth] for p in parts]
    classes = tuple(sorted(set(names)))
    given = _given([SPLITS[p[0]] for p in parts]) if has_splits else {}
    keys = ["/".join(p) for p in parts]
    listing = [f"{key} {file.stat().st_size}" for key, file in zip(keys, files, strict=True)]
    return _Files(files, _numbered(names, classes), classes, given, _hash("\n".join(listing).encode()), keys)


@dataclass
class _Rows:
    """Rows of a memory-mapped `datasets.Dataset`, each of which can be read separately."""

    rows: Any
    files: list[tuple[int, Path]]
    """First row and file, in order."""
    labels: Numbers
    classes: tuple[str, ...]
    fingerprint: str
    keys: Sequence[str]
    given: dict[str, Numbers] = field(default_factory=dict)

    def raw(self, index: int) -> bytes:
        cell = self.rows.data.column("image")[index].as_py()
        found = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(found, bytes):
            raise BadInput(f"{self.place(index)} contains no image bytes")
        return found

    def place(self, index: int) -> str:
        first, file = max(pair for pair in self.files if pair[0] <= index)
        return f"{file}, row {index - first}"


def _parquets(files: list[Path]) -> Source:
    """Rows of a Parquet group cannot be read separately: the files are converted to Arrow once, cached."""
    labels: list[Any] = []
    starts = []
    for file in files:
        with parquet.opened(file, str(file)) as opened:
            missing = {"image", "label"} - set(opened.schema_arrow.names)
            if missing:
                have = ", ".join(opened.schema_arrow.names)
                raise BadInput(f"{file} has no column {' and '.join(sorted(missing))}; it has {have}")
            starts.append((len(labels), file))
            labels += opened.read(columns=["label"]).column("label").to_pylist()
    rows = _as_arrow(files)
    named = tuple(getattr(rows.features["label"], "names", None) or ())  # for a hub dataset
    of = np.repeat([split_of(file) for file in files], np.diff([*(n for n, _ in starts), len(labels)]))
    given = _given(of.tolist())
    withheld = [name for name, those in given.items() if named and _are_withheld(name, labels, those)]
    labelled = np.flatnonzero(~np.isin(of, withheld)).tolist()
    bad = next((n for n in labelled if not _is_label(labels[n], named)), None)
    if bad is not None:
        first, file = max(pair for pair in starts if pair[0] <= bad)
        other = f"the label {labels[bad]}, but there are {len(named)} classes"
        raise BadInput(f"{file}, row {bad - first} has {'no label' if labels[bad] is None else other}")
    names = [named[labels[n]] if named and isinstance(labels[n], int) else str(labels[n]) for n in labelled]
    classes = named or _classes(names)
    listing = [f"{file.name} {file.stat().st_size}" for file in files]
    found = _hash("\n".join(listing).encode(), "\n".join(names).encode())
    numbers = np.full(len(labels), -1, np.int64)
    numbers[labelled] = _numbered(names, classes)
    given = {name: those for name, those in given.items() if name not in withheld}
    bounds = itertools.pairwise([*(n for n, _ in starts), len(labels)])
    rows_of = zip(files, bounds, strict=True)
    keys = [f"{file.name} {n}" for file, (begin, end) in rows_of for n in range(end - begin)]
    return _Rows(rows, starts, numbers, classes, found, keys, given)


def _are_withheld(split: str, labels: Sequence[Any], those: Numbers) -> bool:
    """Whether the labels of a split are not published: `datasets` writes -1 for all of them."""
    return split != "train" and all(labels[number] == -1 for number in those.tolist())


def _is_label(label: Any, named: Sequence[str]) -> bool:
    """Whether an image has a label, which is the number of a class if the classes have names."""
    return label is not None and not (named and isinstance(label, int) and not 0 <= label < len(named))


def _as_arrow(files: list[Path]) -> Any:
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_parquet(
            [str(file) for file in files], columns=["image", "label"],
            cache_dir=str(storage.cache_folder() / "images"),
        )  # fmt: skip
    finally:
        if not shown:
            datasets.enable_progress_bars()


@dataclass
class _Tars:
    """Members of tar shards, by the position of their bytes."""

    files: list[Path]
    members: list[tuple[int, int, int, str]]
    """File, offset, size and name."""
    labels: Numbers
    classes: tuple[str, ...]
    fingerprint: str
    keys: Sequence[str]
    given: dict[str, Numbers] = field(default_factory=dict)

    def raw(self, index: int) -> bytes:
        file, offset, size, _ = self.members[index]
        with self.files[file].open("rb") as opened:
            opened.seek(offset)
            return opened.read(size)

    def place(self, index: int) -> str:
        file, _, _, name = self.members[index]
        return f"{self.files[file]}, {name}"


def _tars(files: list[Path]) -> Source:
    """WebDataset shards: the files of a sample are adjacent, and share everything before the first dot."""
    members, names = [], []
    for number, file in enumerate(files):
        for key, parts in _samples(file).items():
            image = next((p for suffix, p in parts.items() if f".{suffix.lower()}" in SUFFIXES), None)
            if image is None:
                continue
            members.append((number, image.offset_data, image.size, image.name))
            names.append(_tar_label(file, key, parts))
    if not members:
        raise BadInput(f"{', '.join(map(str, files[:3]))}: no images found")
    classes = _classes(names)
    listing = [f"{files[n].name} {offset} {size} {name}" for n, offset, size, name in members]
    found = _hash("\n".join(listing).encode(), "\n".join(names).encode())
    given = _given([split_of(files[number]) for number, *_ in members])
    known = Counter(name for *_, name in members)
    keys = [name if known[name] == 1 else f"{files[n].name} {name}" for n, *_, name in members]
    return _Tars(files, members, _numbered(names, classes), classes, found, keys, given)


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


def _tar_label(file: Path, key: str, parts: dict[str, tarfile.TarInfo]) -> str:
    with file.open("rb") as opened:
        for suffix in ("cls", "json"):
            if suffix in parts:
                opened.seek(parts[suffix].offset_data)
                text = opened.read(parts[suffix].size).decode(errors="replace")
                label = (
                    text.strip() if suffix == "cls" else _json_label(text, f"{file}, {parts[suffix].name}")
                )
                if label not in (None, ""):
                    return str(label)
    raise BadInput(f"{file}, {key.lstrip('/')} has no label: add {key.rpartition('/')[2]}.cls")


def _json_label(text: str, where: str) -> Any:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(found, dict):
        raise BadInput(f'{where}: must be a JSON object such as {{"label": ...}}')
    return found.get("label")


def _given(splits: list[str]) -> dict[str, Numbers]:
    """The images of each split; none unless all files name a split, and not all the same."""
    if "" in splits or len(set(splits)) < 2:
        return {}
    of = np.array(splits)
    return {name: np.flatnonzero(of == name).astype(np.int64) for name in sorted(set(splits))}


def _classes(names: list[str]) -> tuple[str, ...]:
    """Labels in order: numeric labels from 0 to the highest; otherwise by name.

    Numbers of which most are missing are not counted from 0, but identify something.
    """
    if not all(name.isdecimal() for name in names):
        return tuple(sorted(set(names)))
    numbers = sorted(set(map(int, names)))
    is_counted = numbers[-1] < max(_GAPS * len(numbers), _FEW)
    return tuple(map(str, range(numbers[-1] + 1) if is_counted else numbers))


def _numbered(names: list[str], classes: Sequence[str]) -> Numbers:
    number = {name: n for n, name in enumerate(classes)}
    return np.array(
        [number[str(int(name)) if name.isdecimal() and name not in number else name] for name in names]
    )


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
