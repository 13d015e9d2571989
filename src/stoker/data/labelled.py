"""Labelled texts, and their division into train, validation and test.

Texts of one group (one module, one document; by default equal texts) are never in two splits. The split of a
group is decided by a hash of its name, label by label, so that every split has its share of each label.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stoker.data.documents import place
from stoker.errors import BadInput
from stoker.words import some

SPLITS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
"""Names of files and folders, by split."""


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
        return tuple(sorted(names, key=int) if as_numbers else sorted(names))

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
    def repeated(self) -> int:
        """The number of test texts that are also in the train split, if the dataset comes with splits."""
        known = {text.group for text in self.train}
        return sum(text.group in known for text in self.test)


def split_of(file: Path) -> str:
    """The split of a file, by hub conventions: `train-00000-of-00002.parquet`, `val/0001.tar`; or ""."""
    words = [re.split(r"[-_.]", file.name)[0], file.parent.name]
    return next((SPLITS[word] for word in words if word in SPLITS), "")


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


def _unseen(part: Iterable[Text], classes: Sequence[str]) -> list[str]:
    return sorted({text.label for text in part} - set(classes))
