"""Labelled images: folders, Parquet files, WebDataset tar shards, and scikit-learn's digits.

A source only knows where each image is: opening it reads names, headers and labels, and each image is
read separately, so that resuming in the middle of an epoch costs no more than starting. Only Parquet,
which cannot be read row by row, is copied once, into the cache. Decoding runs in the loader's workers.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from stoker.data import image_folder, image_rows, image_shards, image_source, labelled
from stoker.data.documents import place
from stoker.data.image_source import IMAGE_AND_LABEL, SUFFIXES, Columns, Numbers, Source
from stoker.errors import BadInput
from stoker.words import counted, some


def read(reference: str, columns: Columns = IMAGE_AND_LABEL) -> Source:
    """The images of `digits`, a folder, a .parquet or .tar file, or a folder of these.

    A folder of images has one subfolder per class; there can be `train`, `val` and `test` folders above
    these, and files can be in such folders or have such names (`train-00000.parquet`). Parquet files have a
    column with the image, bytes or a struct with `bytes`, and one with the label. Samples of a tar shard are
    `KEY.jpg` (or another image type) with `KEY.cls`, or `KEY.json` with the label. Hidden files are left out.

    Raises:
        BadInput: there are no images, or one has no label.
    """
    if reference == "digits":
        return _digits()
    path = Path(reference).expanduser()
    if not path.exists():
        raise BadInput(f"data={reference} does not exist: give digits, a folder, a .parquet or a .tar file")
    files = [path] if path.is_file() else labelled.files_in(path)
    shown = [file for file in files if file.suffix.lower() in SUFFIXES]
    rows, shards = ([file for file in files if file.suffix.lower() == s] for s in (".parquet", ".tar"))
    if shards and not image_folder.are_classes(path, shown):
        return image_shards.read(shards, columns, _others(files, shards))
    if rows and not image_folder.are_classes(path, shown):
        return image_rows.read(rows, columns, _others(files, rows))
    if path.is_file():
        raise BadInput(
            f"data={reference} is a single file: give a folder with one folder of images per class, or a "
            ".parquet or .tar file"
        )
    return image_folder.read(path, shown, _others(files, shown))


def _others(files: Sequence[Path], used: Sequence[Path]) -> list[Path]:
    known = set(used)
    return [file for file in files if file not in known]


def picture(source: Source, index: int) -> Image.Image:
    """A decoded image. Raises BadInput, naming its location, if it cannot be read."""
    try:
        found = source.raw(index)
    except OSError as error:
        raise BadInput(
            f"{source.place(index)} cannot be read any more ({error.strerror or error}): restore it, or "
            "resume the run without it"
        ) from error
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
    except Image.DecompressionBombError as error:
        raise BadInput(
            f"{source.place(index)} is too large to be decoded: {error}; scale it down, or remove it"
        ) from error
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        raise BadInput(f"{source.place(index)} is not a readable image: {error}; fix or remove it") from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """An image whose grey has 16 bits, with the upper 8, as Pillow reads colours of 16 bits.

    Converted by Pillow, all but the darkest of its 65,536 greys would be white.
    """
    if image.mode == "F":
        raise ValueError("its pixels are fractions, whose scale is not known: save it with 8 or 16 bits")
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
    places = np.array([place(f"{seed} {name}") for name in source.names()])[everything]
    held |= {name: everything[those] for name, those in _held_out(places, source.labels[everything], shares)}
    if min(len(held[name]) for name in ("train", "validation", "test")) == 0:
        raise BadInput(f"{len(source.labels)} images are too few for training, validation and test")
    found = Splits(held["train"], held["validation"], held["test"])
    _check(source, found)
    return found


def _check(source: Source, splits: Splits) -> None:
    """Raises BadInput if there is nothing to learn, or a class that is measured is not trained on."""
    trained = np.unique(source.labels[splits.train])
    names = [source.classes[number] for number in trained.tolist()]
    if len(names) < 2:
        raise BadInput(
            f"every training image has the class {names[0]!r}, so there is nothing to learn: give a folder "
            "with one folder of images per class, or the label_column= with the classes"
        )
    for name, those in (("validation", splits.validation), ("test", splits.test)):
        unseen = np.setdiff1d(source.labels[those], trained)
        if unseen.size:
            raise BadInput(
                f"the {name} images have the class {source.classes[unseen[0]]!r}, but the training images "
                f"have only {some(names)}: add such images to the training ones, or leave it out"
            )


def describe(source: Source, splits: Splits) -> str:
    """The numbers of images and classes, the splits, and what is left out, in words."""
    labels = source.labels[splits.train]
    most = np.bincount(labels)
    left_out = f"; left out: {'; '.join(source.left_out)}" if source.left_out else ""
    used = len(splits.train) + len(splits.validation) + len(splits.test)
    return (
        f"{counted(used, 'image')}, {len(source.classes)} classes, the largest, "
        f"{source.classes[most.argmax()]}, with {100 * most.max() / len(labels):.1f}% of the "
        f"{len(labels):,} training images; {len(splits.validation):,} for validation, "
        f"{len(splits.test):,} for the test{left_out}"
    )


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
    given: dict[str, Numbers] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def names(self) -> Iterator[str]:
        return map(str, range(len(self.labels)))

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
    fingerprint = image_source.digest(pixels.tobytes(), found.target.tobytes())
    return _Pictures(pixels, found.target.astype(np.int64), classes, fingerprint)
