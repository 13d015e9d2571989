"""Documents, and their division into train, validation and test.

The split of a document is decided by a hash of its key, not by its position: it stays the same
when documents are added, and documents with the same key are never in two splits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stoker.data import called
from stoker.errors import BadInput
from stoker.words import counted

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles in a conversation, as chat templates call them; some templates know others too."""


class Message(NamedTuple):
    """A turn of a conversation."""

    role: str
    content: str
    more: str = ""
    """Its other parts (`tool_calls`, `reasoning_content`, ...), as a JSON object; usually empty."""

    @property
    def parts(self) -> tuple[str, ...]:
        """All texts that it consists of."""
        return self if self.more else self[:2]

    @property
    def is_empty(self) -> bool:
        """Whether it contains no content, reasoning or calls."""
        return not self.content.strip() and set(json.loads(self.more or "{}")) <= {called.SILENT, called.NAME}


@dataclass(frozen=True, slots=True)
class Document:
    """A text, an answer to a prompt, or a conversation; `key` decides its split."""

    key: str
    prompt: str
    """Empty for plain text and for a conversation."""
    text: str
    """The plain text, or the answer; empty for a conversation."""
    messages: tuple[Message, ...] = ()
    """The turns of a conversation; empty for anything else."""
    system: str = ""
    """The system prompt of a pair; in a conversation it is one of the messages."""
    tools: str = ""
    """The tools that the assistant of a conversation can call, as a JSON array of schemas; usually empty."""
    template_values: str = ""
    """Values for its chat template, as a JSON object; usually empty."""
    unread: tuple[str, ...] = ()
    """Fields of its record that other trainers use, but that are not part of this document."""
    where: str = field(default="", compare=False)
    """The location of its record, for messages; empty if there is none."""

    @property
    def lacking(self) -> str:
        """What is missing, if nothing can be learnt from the document and it is left out; otherwise empty."""
        if any(message.role == "assistant" and not message.is_empty for message in self.messages):
            return ""
        if self.messages:
            roles = dict.fromkeys(message.role for message in self.messages)
            if "assistant" in roles:
                return "nothing that the assistant says"
            return f"no message with the role assistant (its roles are {', '.join(roles)})"
        if self.text.strip():
            return ""
        return "no answer" if self.prompt else "no text"

    @property
    def unknown_roles(self) -> tuple[str, ...]:
        """The roles of its messages that are not in ROLES."""
        return tuple(dict.fromkeys(message.role for message in self.messages if message.role not in ROLES))


class LeftOut(NamedTuple):
    """Records that were left out because nothing can be learnt from them."""

    records: int
    of: int
    """The total number of records."""
    first: str
    """The location of the first one."""
    lacking: str
    """What the first one lacks."""


@dataclass(frozen=True)
class Corpus:
    """Documents with the SHA-256 of their content and a description of their origin."""

    documents: list[Document]
    fingerprint: str
    description: str
    left_out: tuple[LeftOut, ...] = ()
    """One entry per source that has any."""


@dataclass(frozen=True)
class Splits:
    """The three parts of a corpus, each in the corpus's order."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]


def make_corpus(documents: list[Document], description: str, left_out: tuple[LeftOut, ...] = ()) -> Corpus:
    """A corpus of these documents, identified by their content."""
    digest = hashlib.sha256()
    for document in documents:
        said = itertools.chain.from_iterable(message.parts for message in document.messages)
        parts = [document.key, document.prompt, document.text, *said]
        for name in ("system", "tools", "template_values"):
            if own := getattr(document, name):
                parts += name, own
        for part in parts:
            content = part.encode()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return Corpus(documents, digest.hexdigest(), description, left_out)


def content_key(*parts: str) -> str:
    """The key of a document that has no name: a hash of its content."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def learnable(documents: Sequence[Document], source: str) -> tuple[list[Document], tuple[LeftOut, ...]]:
    """Separate the documents from which something can be learnt, and summarise the others.

    Args:
        source: their origin, for messages.

    Raises:
        BadInput: nothing can be learnt from any of them.
    """
    kept: list[Document] = []
    others: list[Document] = []
    for document in documents:
        (others if document.lacking else kept).append(document)
    if not kept and not others:
        raise BadInput(f"{source} is an empty dataset: it contains no text")
    stranger = next((document for document in others if document.unknown_roles), None)
    if not kept and stranger is not None:
        raise BadInput(
            f"{source}: the assistant says nothing in {counted(len(others), 'record')}, and {stranger.where} "
            f"has the unknown roles {', '.join(stranger.unknown_roles)}: name the roles system, user "
            "(or human), assistant (or gpt, ai, bot, model) and tool"
        )
    if not kept:
        raise BadInput(
            f"{source} is an empty dataset: nothing can be learnt from {counted(len(others), 'record')}; the "
            f"first, {others[0].where}, has {others[0].lacking}"
        )
    if not others:
        return kept, ()
    return kept, (LeftOut(len(others), len(documents), others[0].where, others[0].lacking),)


def split(documents: Sequence[Document], validation: float = 0.05, test: float = 0.05) -> Splits:
    """Divide documents into three parts of about these fractions; only a part with fraction 0 is empty.

    Raises BadInput if there are fewer different keys than parts, or if nothing would be left for
    training.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise BadInput(
            f"validation={validation} and test={test}: must be at least 0, and leave data to train on"
        )
    places = sorted({document.key for document in documents}, key=place)
    parts = ["train", *(["validation"] if validation else []), *(["test"] if test else [])]
    if len(places) < len(parts):
        found = "is 1 different document" if len(places) == 1 else f"are {len(places)} different documents"
        among = f" among {len(documents):,}" if len(documents) > len(places) else ""
        raise BadInput(
            f"there {found}{among}: {', '.join(parts[:-1])} and {parts[-1]} need at least one each, so give "
            f"at least {len(parts)}"
        )
    most = len(places) - (2 if validation else 1)
    tests = _count(places, 0.0, test, most) if test else 0
    most = len(places) - tests - 1
    validations = _count(places, test, test + validation, most) if validation else 0
    in_test, in_validation = set(places[:tests]), set(places[tests : tests + validations])
    return Splits(
        train=[d for d in documents if d.key not in in_test and d.key not in in_validation],
        validation=[d for d in documents if d.key in in_validation],
        test=[d for d in documents if d.key in in_test],
    )


def split_by_place(documents: Sequence[Document], *, validation: float, test: float) -> Splits:
    """Divide part of a corpus like `split`, but only by the places of the keys."""
    bounds = {"test": (0.0, test), "validation": (test, test + validation), "train": (test + validation, 1.0)}
    return Splits(
        **{
            name: [document for document in documents if low <= place(document.key) < high]
            for name, (low, high) in bounds.items()
        }
    )


def place(key: str) -> float:
    """A key's fixed place in [0, 1), which decides its split."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def _count(places: Sequence[str], low: float, high: float, most: int) -> int:
    return min(max(1, sum(low <= place(key) < high for key in places)), most)


def chop(text: str, limit: int) -> list[str]:
    """Cut a text into parts of at most `limit` characters.

    Cuts are made between paragraphs if possible, else after a sentence, a line or a word.
    """
    parts: list[str] = []
    rest = text.strip("\n")
    begin = 0
    while len(rest) - begin > limit:
        cut = _cut(rest, begin, limit)
        parts.append(rest[begin:cut].rstrip())
        begin = cut + rest.startswith(" ", cut)
        while rest.startswith("\n", begin):
            begin += 1
    return [part for part in [*parts, rest[begin:].rstrip()] if part.strip()]


def _cut(text: str, begin: int, limit: int) -> int:
    """The end of the part that begins at `begin`, at most `limit` characters later."""
    for border, kept in (("\n\n", 0), (".\n", 1), ("\n", 0), (" ", 0)):
        at = text.rfind(border, begin + 1, begin + limit - kept + len(border))
        if at > 0:
            return at + kept
    return begin + limit
