"""Labelled texts, their files and labels, and their division into train, validation and test.

Texts of one group (one module, one document; by default equal texts) are never in two splits. The split of a
group is decided by a hash of its name, label by label, so that every split has its share of each label.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stoker import storage
from stoker.data import records
from stoker.data.documents import place
from stoker.errors import BadInput, nearest
from stoker.words import some

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
"""Names of files and folders in lower case, by split."""

_MARKS = 20  # labels that may be fractions and still are classes


class Text(NamedTuple):
    """A text with its label."""

    text: str
    label: str
    group: str
    """Texts of one group are in the same split."""


@dataclass(frozen=True)
class Texts:
    """The three parts of a dataset, each in the dataset's order."""

    train: list[Text]
    validation: list[Text]
    test: list[Text]
    description: str

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels in order: whole numbers numerically, others by name."""
        names = {text.label for text in self.train}
        as_numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
        return tuple(sorted(names, key=lambda name: (int(name) if as_numbers else 0, name)))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the texts and labels of each part."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(f"{len(part)};".encode())
            for text in part:
                for content in (text.text.encode(), text.label.encode()):
                    digest.update(len(content).to_bytes(8, "little"))
                    digest.update(content)
        return digest.hexdigest()

    @property
    def are_hardly_repeated(self) -> bool:
        """Whether most labels are those of a single text."""
        return 2 * len(self.classes) > len(self.train)

    @property
    def repeated(self) -> int:
        """The number of test texts that are also in the train split, if the dataset comes with splits."""
        known = {text.group for text in self.train}
        return sum(text.group in known for text in self.test)


def split_of(file: Path, folder: Path) -> str:
    """The split of a file, by hub conventions: `train-00000-of-00002.parquet`, `val/0001.tar`; or "".

    Args:
        folder: with all files of the dataset; its own name says nothing about them.
    """
    words = [re.split(r"[-_.]", file.name)[0].lower(), file.parent.name.lower() * (file.parent != folder)]
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def splits_of(files: Sequence[Path]) -> list[str]:
    """The split of each file of a dataset; "train" for all if they do not differ.

    Raises:
        BadInput: some files belong to a split and others do not.
    """
    folder = Path(os.path.commonpath([file.parent for file in files]))
    splits = [split_of(file, folder) for file in files]
    if len(set(splits)) == 1:
        return ["train"] * len(files)
    if "" in splits:
        raise BadInput(
            f"{files[splits.index('')]} belongs to no split, but other files do: name it train, validation "
            "or test, or move it elsewhere"
        )
    return splits


def is_hidden(name: str) -> bool:
    """Whether a file or folder is an editor's or an operating system's, not data."""
    return name.startswith(".") or name == "__MACOSX"


def files_in(folder: Path) -> list[Path]:
    """The files below a folder in order, except hidden ones. Links are followed; one to nothing is a file.

    Raises:
        BadInput: a folder cannot be read.
    """
    try:
        found = storage.walk(folder, is_hidden)
        return [Path(entry.path) for entry in found if entry.is_file() or entry.is_symlink()]
    except OSError as error:
        raise BadInput(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def label_of(where: str, value: Any, column: str, classes: Sequence[str] = ()) -> str:
    """A label as text.

    Args:
        where: its location, for messages.
        classes: the names of the classes, of which whole numbers are then the numbers.

    Raises:
        BadInput: it is neither a text nor a whole number nor a truth value, or the number of no class.
    """
    if isinstance(value, int) and not isinstance(value, bool) and classes:
        if not 0 <= value < len(classes):
            raise BadInput(f"{where}: the label is {value}, but the dataset has {len(classes)} classes")
        return str(classes[value])
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise BadInput(
        f"{where}: {column!r} must be a string, a whole number, or true or false, not "
        f"{'an empty string' if value == '' else records.kind_of(value)}: a label is the name or the number "
        "of one class; correct it, or set label_column="
    )


class NoColumn(BadInput):
    """There is no column with the name that a key of the config gives."""

    def __init__(self, where: str, column: str, key: str, names: Collection[str]) -> None:
        has = ", ".join(map(repr, names)) or "none"
        super().__init__(
            f"{where}: no column {column!r}: set {key}=; its columns are {has}{nearest(column, names)}"
        )
        self.key = key


def check_columns(where: str, wanted: Mapping[str, str], names: Collection[str]) -> None:
    """Raises NoColumn if one of the wanted columns, by the keys that give them, does not exist."""
    for key, column in wanted.items():
        if column not in names:
            raise NoColumn(where, column, key, names)


def divided(
    given: Mapping[str, Sequence[Text]], *, validation: float, test: float, description: str
) -> Texts:
    """The given splits; missing ones are held out from the train split.

    Args:
        given: texts by split; only "train" if there are no splits.
        validation, test: shares of the texts to hold out if there is no such split.

    Raises:
        BadInput: a split would be empty, there is only one label, or a label is not in the train split.
    """
    if not given.get("train"):
        raise BadInput(f"{description}: there is nothing to train on")
    lacking = {name: s for name, s in (("validation", validation), ("test", test)) if not given.get(name)}
    parts = {**given, **held_out(given["train"], lacking)}
    found = Texts(
        train=list(parts["train"]),
        validation=list(parts["validation"]),
        test=list(parts["test"]),
        description=description,
    )
    _check(found)
    return found


def held_out(texts: Sequence[Text], shares: Mapping[str, float]) -> dict[str, list[Text]]:
    """Divide texts into "train" and parts of about these shares, per label and by whole groups.

    In a fixed order, each group goes to the part with the most room if it fits, else to train.
    """
    sizes = Counter(text.group for text in texts)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for group, label in {text.group: text.label for text in reversed(texts)}.items():
        groups[label].append(group)
    part_of = {}
    for names in groups.values():
        total = sum(sizes[name] for name in names)
        room = {part: round(share * total) for part, share in shares.items()}
        for name in sorted(names, key=place)[:-1]:  # one stays in train, whatever the shares
            fitting = [part for part, left in room.items() if sizes[name] <= left]
            if fitting:
                part_of[name] = max(fitting, key=room.__getitem__)
                room[part_of[name]] -= sizes[name]
    found: dict[str, list[Text]] = {"train": [], **{part: [] for part in shares}}
    for text in texts:
        found[part_of.get(text.group, "train")].append(text)
    return found


def _check(found: Texts) -> None:
    parts = {"train": found.train, "validation": found.validation, "test": found.test}
    count = sum(map(len, parts.values()))
    classes = found.classes
    if _are_measured(classes):
        raise BadInput(
            f"{found.description}: the labels are {len(classes):,} different numbers, such as {classes[1]}: "
            "this recipe predicts one of several classes, not a number: give each text the name of a class "
            "or of a range (low, high), or set label_column="
        )
    if 1 < len(classes) == len(found.train):
        raise BadInput(
            f"{found.description}: each of the {len(classes)} texts has a different label: is label_column "
            "correct?"
        )
    empty = next((name for name, part in parts.items() if not part), None)
    if empty is not None:
        raise BadInput(
            f"{found.description}: {count} texts are too few for training, validation and test, the {empty} "
            "split would be empty: give more texts, or a larger share"
        )
    if len(classes) < 2:
        raise BadInput(
            f"{found.description}: every training text has the label {classes[0]!r}, so there is nothing to "
            "learn: is label_column correct?"
        )
    for name in ("validation", "test"):
        unseen = _unseen(parts[name], classes)
        if unseen:
            raise BadInput(
                f"{found.description}: the {name} split has the label {unseen[0]!r}, but the training texts "
                f"have only {some(classes)}"
            )


def _are_measured(classes: Sequence[str]) -> bool:
    """Whether labels are numbers on a scale. A few fractions are taken for classes, such as 4.5 stars."""
    try:
        return len(classes) > _MARKS and not all(float(name).is_integer() for name in classes)
    except ValueError:
        return False


def _unseen(part: Iterable[Text], classes: Sequence[str]) -> list[str]:
    return sorted({text.label for text in part} - set(classes))
