"""The data of the language recipe: documents, their splits, and packed rows of tokens.

A conversation goes through the tokenizer's own chat template, and so does a pair where there is one. What is
learnt is what the assistant says, with the token that ends it, or everything.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from stoker import storage
from stoker.attempt import Run
from stoker.data import sources, tokens
from stoker.data.documents import Document, Message, make_corpus
from stoker.data.mixture import Mixture
from stoker.data.sources import Source
from stoker.data.stream import Stream
from stoker.data.tokens import Encoded, PackedDataset
from stoker.errors import BadInput

log = logging.getLogger("stoker")

PROMPT = "### Question\n{prompt}\n\n### Answer\n"
"""How a pair is asked where the tokenizer has no chat template."""

LossOn = Literal["answer", "all"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rows:
    """Rows of tokens for each use."""

    train: PackedDataset | Stream | Mixture
    validation: dict[str, PackedDataset]
    """By the name of their source."""
    test: dict[str, PackedDataset]


def pack(
    found: Sequence[Source],
    tokenizer: Any,
    *,
    sequence_length: int,
    loss_on: LossOn = "answer",
    packing: bool = True,
) -> Rows:
    """Tokenise and pack each source, once for the same content, tokenizer and settings.

    Args:
        packing: whether documents share rows.

    Raises:
        BadInput: a tokenizer does not do for the documents, or nothing is left of them.
    """
    encoder = Encoder(tokenizer, loss_on)
    settings: dict[str, Any] = {
        "encode": encoder, "pad_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer),
        "sequence_length": sequence_length, "packing": packing, "cache": storage.cache_folder(),
    }  # fmt: skip

    def packed(source: Source, split: str) -> PackedDataset:
        documents: list[Document] = getattr(source.splits, split)
        corpus = make_corpus(documents, split).fingerprint
        made = tokens.tokenise(documents, fingerprint=(corpus, encoder.fingerprint), **settings)
        _say_what_is_lost(f"{source.name}, {split}" if len(found) > 1 else split, made)
        return made

    def trained_on(source: Source) -> PackedDataset | Stream:
        if source.stream is None:
            return packed(source, "train")
        return Stream(
            source.stream, held_out=source.held_out, sampled=sources.looked_at(source.stream),
            fingerprint=(source.fingerprint, encoder.fingerprint), **settings,
        )  # fmt: skip

    parts = [trained_on(source) for source in found]
    return Rows(
        train=Mixture(parts, [source.weight for source in found]) if len(parts) > 1 else parts[0],
        validation={source.name: packed(source, "validation") for source in found},
        test={source.name: packed(source, "test") for source in found},
    )


def say(run: Run, found: Sequence[Source], rows: Rows, *, packed: bool, wanted: bool) -> None:
    """Record what the data is, and say it on rank 0."""
    about = [source.description for source in found]
    run.event("data", sources=about, rows=len(rows.train), tokens_per_row=rows.train.tokens_per_sample)
    if run.world.rank > 0:
        return
    for source, description in zip(found, about, strict=True):
        log.info("data: %s%s", description, f", weight {source.weight:g}" if len(found) > 1 else "")
    if wanted and not packed:
        log.warning("the model's attention cannot keep documents apart: each has rows of its own")


def _say_what_is_lost(name: str, rows: PackedDataset) -> None:
    lost = rows.statistics
    if lost.dropped or lost.truncated:
        log.warning(
            "%s: %d answers are cut off at %d tokens, and %d documents are left out, of whose answers "
            "nothing is left: raise sequence_length",
            name, lost.truncated, rows.sequence_length, lost.dropped,
        )  # fmt: skip


def prompts(documents: Sequence[Document], tokenizer: Any) -> tuple[str, ...]:
    """What two generations begin with: questions of the documents, or the first words of texts."""
    chosen = sorted(documents, key=lambda document: document.key)[:2]
    return tuple(_beginning(document, tokenizer) for document in chosen)


def _beginning(document: Document, tokenizer: Any) -> str:
    messages = _as_messages(document, tokenizer)
    asked = list(itertools.takewhile(lambda message: message.role != "assistant", messages))
    if asked:
        return _render(tokenizer, asked, to_be_answered=True)
    text = messages[0].content if messages else document.text
    return PROMPT.format(prompt=document.prompt) if document.prompt else " ".join(text.split()[:8])


class Encoder:
    """Documents as tokens, and which of them are to be predicted.

    Args:
        tokenizer: a fast one, where there are conversations, or pairs and a chat template.
        loss_on: answer: what the assistant says; all: every token but the first.
    """

    def __init__(self, tokenizer: Any, loss_on: LossOn) -> None:
        self._tokenizer, self._loss_on = tokenizer, loss_on
        first = tokenizer("").get("input_ids", [])
        self._begin = list(first[:1]) if tokenizer.bos_token_id in first[:1] else []

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what tokens a document becomes."""
        template = getattr(self._tokenizer, "chat_template", None)
        parts = (fingerprint(self._tokenizer), PROMPT, str(template), self._loss_on, str(self._begin))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def __call__(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        """The tokens of each document. Raises BadInput."""
        chats = [_as_messages(document, self._tokenizer) for document in documents]
        rendered = iter(self._chats([chat for chat in chats if chat]))
        plain = iter(self._plain([d for d, chat in zip(documents, chats, strict=True) if not chat]))
        for chat in chats:
            yield next(rendered if chat else plain)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _plain(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        asked = iter(self._ids([PROMPT.format(prompt=d.prompt) for d in documents if d.prompt]))
        for document, text in zip(documents, self._ids([d.text for d in documents]), strict=True):
            prompt = next(asked) if document.prompt else []
            ids = [*self._begin, *prompt, *text, self._tokenizer.eos_token_id]
            if not document.prompt:
                yield Encoded(ids if text else [], None)
                continue
            silent = len(self._begin) + len(prompt) if self._loss_on == "answer" else 0
            yield Encoded(ids, [False] * silent + [bool(text)] * (len(ids) - silent))

    def _chats(self, chats: Sequence[Sequence[Message]]) -> Iterator[Encoded]:
        if not chats:
            return
        if not self._tokenizer.is_fast:
            raise BadInput(
                "conversations need a fast tokenizer (tokenizer.json), which knows places in the text"
            )
        texts = [_render(self._tokenizer, chat) for chat in chats]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for chat, text, ids, places in zip(
            chats, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if self._loss_on == "all":
                yield Encoded(ids, [True] * len(ids))
            else:
                yield Encoded(ids, _within(places, _answers(self._tokenizer, chat, text)))


def _as_messages(document: Document, tokenizer: Any) -> tuple[Message, ...]:
    """A document as a conversation, if it is one or can be made one; else empty. Raises BadInput."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if document.messages and not has_template:
        raise BadInput(
            "the data has conversations, and the tokenizer has no chat template: give chat_template=FILE (a "
            "Jinja template), tokenizer= of a model that has one, or data of prompts and completions"
        )
    if document.messages or not (document.prompt and has_template):
        return document.messages
    return Message("user", document.prompt), Message("assistant", document.text)


def _render(tokenizer: Any, chat: Sequence[Message], *, to_be_answered: bool = False) -> str:
    """A conversation as its template writes it. Raises BadInput where that refuses it."""
    try:
        text: str = tokenizer.apply_chat_template(
            [message._asdict() for message in chat], tokenize=False, add_generation_prompt=to_be_answered
        )
    except TemplateError as error:
        roles = ", ".join(message.role for message in chat)
        raise BadInput(f"the chat template refuses a conversation of the roles {roles}: {error}") from error
    return text


def _answers(tokenizer: Any, chat: Sequence[Message], text: str) -> list[Span]:
    """Where in its text the assistant speaks, with what ends each turn: characters, from and to.

    A turn begins behind what the template writes to have it answered, and ends with what the template
    writes of the conversation up to it. Where that is not a beginning of the whole text (some templates
    leave out of earlier turns what was only thought), it is what was said that is looked for.
    """
    spans: list[Span] = []
    behind = 0
    for number, message in enumerate(chat):
        if message.role != "assistant":
            continue
        before = _render(tokenizer, chat[:number], to_be_answered=True) if number else ""
        until = text if number == len(chat) - 1 else _render(tokenizer, chat[: number + 1])
        if text.startswith(before) and text.startswith(until) and number:
            span = (len(before), len(until.rstrip()))
        else:
            said = message.content.strip()
            begin = text.find(said, behind)
            if begin < 0:
                continue
            span = (begin, _end_of_turn(tokenizer, text, begin + len(said)))
        spans.append(span)
        behind = span[1]
    return spans


def _end_of_turn(tokenizer: Any, text: str, end: int) -> int:
    """Behind the special token that follows at once, if one does."""
    following = (t for t in tokenizer.all_special_tokens if text.startswith(t, end))
    return end + len(max(following, key=len, default=""))


def _within(places: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token, in the order of the text, begins in one of the spans and is of some of it."""
    found = [False] * len(places)
    for span in spans:
        first, last = (bisect.bisect_left(places, edge, key=operator.itemgetter(0)) for edge in span)
        found[first:last] = [end > begin for begin, end in places[first:last]]
    return found


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides how a text is tokenised."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()
