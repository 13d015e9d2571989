"""The data of the llm recipe: documents, their splits, and packed rows of tokens.

Conversations are written with the tokenizer's chat template, and so are pairs if there is one. The model
learns what the assistant says, with the token that ends it, or everything.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import hashlib
import itertools
import json
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stoker import storage
from stoker.data import hub_datasets, sources, tokens
from stoker.data.documents import Document, Message, make_corpus
from stoker.data.encoding import Encoded
from stoker.data.mixture import Mixture
from stoker.data.sources import Source
from stoker.data.stream import Stream
from stoker.data.tokens import PackedDataset
from stoker.errors import BadInput
from stoker.language import chat_template, conversation
from stoker.language.conversation import NO_VALUES, Chat, Span
from stoker.user_run import Run
from stoker.words import counted

log = logging.getLogger("stoker")

PROMPT = "### Question\n{prompt}\n\n### Answer\n"
"""The format of a pair's prompt if the tokenizer has no chat template."""

_PROMPT_AS_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ message.content + eos_token }}
{%- elif message.role == 'user' -%}
{{ '### Question\n' + message.content + '\n\n### Answer\n' }}
{%- else -%}
{{ message.content + '\n\n' }}
{%- endif -%}
{%- endfor -%}"""

_MARKS = "mark where the chat template writes one with {% generation %} (chat_template=FILE)"
_UNFOUND = f"no assistant turn to learn was found: {_MARKS}"

_OFTEN = 4  # passes over a source per epoch

LossOn = Literal["answer", "last", "all"]


@dataclass(frozen=True)
class Rows:
    """Rows of tokens for each split."""

    train: PackedDataset | Stream | Mixture
    validation: dict[str, PackedDataset]
    """By source name."""
    test: dict[str, PackedDataset]
    encoding: str
    """The fingerprint of the tokenisation."""


def pack(
    found: Sequence[Source],
    tokenizer: Any,
    *,
    sequence_length: int,
    loss_on: LossOn = "answer",
    packing: bool = True,
    values: Mapping[str, Any] = NO_VALUES,
) -> Rows:
    """Tokenise and pack each source, once for the same content, tokenizer and settings.

    Args:
        packing: whether documents share rows.
        values: values for the chat template, see `conversation.of`.

    Raises:
        BadInput: the tokenizer does not support the documents, or nothing is left of them.
    """
    encoder = Encoder(tokenizer, loss_on, values)
    settings = _settings(encoder, tokenizer, sequence_length, packing)
    packed = _packer(found, tokenizer, encoder, settings)

    def trained_on(source: Source) -> PackedDataset | Stream:
        if source.stream is None:
            return packed(source, "train")
        name = _named(found, source, "sampled part")
        with _naming(name):
            made = Stream(
                source.stream, held_out=source.held_out, sampled=sources.looked_at(source.stream),
                fingerprint=(source.fingerprint, encoder.fingerprint), **settings,
            )  # fmt: skip
        _say_what_is_lost(name, made.looked_at())
        return made

    trained = [source for source in found if source.key == "data"]
    parts = [trained_on(source) for source in trained]
    return Rows(
        train=Mixture(parts, [source.weight for source in trained]) if len(parts) > 1 else parts[0],
        validation={s.name: packed(s, "validation") for s in found if s.splits.validation},
        test={s.name: packed(s, "test") for s in found if s.splits.test},
        encoding=encoder.fingerprint,
    )


def pack_evaluated(
    found: Sequence[Source],
    tokenizer: Any,
    *,
    sequence_length: int,
    loss_on: LossOn = "answer",
    packing: bool = True,
    values: Mapping[str, Any] = NO_VALUES,
) -> dict[str, PackedDataset]:
    """Tokenise and pack evaluation data, by the name of its source; see `pack`."""
    encoder = Encoder(tokenizer, loss_on, values)
    packed = _packer(found, tokenizer, encoder, _settings(encoder, tokenizer, sequence_length, packing))
    return {source.name: packed(source, "validation") for source in found}


def _settings(encoder: Encoder, tokenizer: Any, sequence_length: int, packing: bool) -> dict[str, Any]:
    """Settings that `tokens.tokenise` and `Stream` share."""
    return {
        "encode": encoder, "pad_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer),
        "sequence_length": sequence_length, "packing": packing, "cache": storage.cache_folder(),
    }  # fmt: skip


def _packer(
    found: Sequence[Source], tokenizer: Any, encoder: Encoder, settings: Mapping[str, Any]
) -> Callable[[Source, str], PackedDataset]:
    """A function that packs a split of one of these sources. Warns about all of them first."""
    _warn_of_unread(found, tokenizer)
    _warn_of_left_out(found)
    _warn_of_endless_turns(found, tokenizer)

    def packed(source: Source, split: str) -> PackedDataset:
        documents: list[Document] = getattr(source.splits, split)
        corpus = make_corpus(documents, split).fingerprint
        with _naming(_named(found, source, split)):
            made = tokens.tokenise(documents, fingerprint=(corpus, encoder.fingerprint), **settings)
        _say_what_is_lost(_named(found, source, split), [made])
        return made

    return packed


def _named(found: Sequence[Source], source: Source, split: str) -> str:
    """The name of a split, with its source if its key has several."""
    alone = sum(other.key == source.key for other in found) == 1
    return split if alone else f"{source.name}, {split}"


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """If nothing is left of the documents, add their source to the error, and what helps."""
    try:
        yield
    except tokens.NothingLeft as error:
        unfound = f"; in {error.unfound:,} {_UNFOUND}" if error.unfound else ""
        raise BadInput(f"{name}: {error}{unfound}") from error


def _record(run: Run, key: sources.Key, names: Sequence[str], found: Sequence[Source]) -> None:
    """Record each dataset of a key under its own name; a single one is named like the key."""
    each = [source.fingerprint for source in found]
    if len(each) != len(names):  # they were read as one
        each = [sources.fingerprint(found)] * len(names)
    for name, fingerprint in zip(names, each, strict=True):
        own = name if key == "data" else f"{key} {name}"  # several keys can name the same
        called = own if len(names) > 1 else key
        if sources.is_here(name):
            run.data(called, name)
        else:
            run.data(called, name, fingerprint=f"sha256:{fingerprint}", revision=hub_datasets.revision(name))


def say(
    run: Run,
    given: Mapping[sources.Key, str],
    found: Sequence[Source],
    rows: Rows,
    *,
    packed: bool,
    wanted: bool,
) -> None:
    """Record what the data of each key is, named as in the config, and log it on rank 0."""
    of_keys = {key: [source for source in found if source.key == key] for key in given}
    for key, own in of_keys.items():
        run.fingerprint(key, sources.fingerprint(own))
        _record(run, key, sources.named(given[key], key), own)
    run.fingerprint("encoding", rows.encoding)
    about = {
        "sources" if key == "data" else key: [source.description for source in own]
        for key, own in of_keys.items()
    }
    run.attempt.event("data", **about, rows=len(rows.train), tokens_per_row=rows.train.tokens_per_sample)
    if run.world.rank > 0:
        return
    passes = iter(rows.train.passes if isinstance(rows.train, Mixture) else ())
    for source in found:
        often = next(passes, None) if source.key == "data" else None
        _say_source(source, often)
    log.info("%s", _divided(found))
    warn_of_repeated(found)
    if wanted and not packed:
        log.warning("the model's attention cannot separate documents: each document gets its own rows")


def say_evaluated(run: Run, given: str, found: Sequence[Source]) -> None:
    """Record the evaluation data under the names in the config; rank 0 logs it."""
    run.fingerprint("data", sources.fingerprint(found))
    _record(run, "data", sources.named(given, evaluated=True), found)
    run.attempt.event("data", sources=[source.description for source in found])
    for source in found if run.world.rank == 0 else ():
        log.info("%s", source.description)


def _say_source(source: Source, passes: float | None) -> None:
    """Log a source; in a weighted mixture, also how many times an epoch goes through it."""
    if passes is None:
        log.info("%s: %s", source.key, source.description)
        return
    log.info(
        "%s: %s, weight %g: seen %.3g times per epoch",
        source.key, source.description, source.weight, passes,
    )  # fmt: skip
    if passes > _OFTEN:
        log.warning(
            "%s: %s is seen %.3g times per epoch and may be memorised: lower its weight, or give more of it",
            source.key, source.name, passes,
        )  # fmt: skip


def _divided(found: Sequence[Source]) -> str:
    """The number of documents per split; for a stream, of those that were sampled."""
    uses = {
        use: sum(len(getattr(source.splits, split)) for source in found)
        for split, use in (("train", "trained on"), ("validation", "validation"), ("test", "test"))
    }
    parts = ", ".join(f"{count:,} {use}" for use, count in uses.items() if count or use == "trained on")
    looked_at = " sampled" if any(source.stream for source in found) else ""
    return f"{counted(sum(uses.values()), 'document')}{looked_at}: {parts}"


def _warn_of_unread(found: Sequence[Source], tokenizer: Any) -> None:
    """Warn of fields in a source's records that other trainers learn from, but this one does not read."""
    for source in found:
        documents = [*source.splits.train, *source.splits.validation, *source.splits.test]
        names = dict.fromkeys(name for document in documents for name in document.unread)
        called = next((document.tools for document in documents if document.tools), "")
        if called and "tools" not in conversation.template(tokenizer, called):
            names["tools"] = None
        if names:
            fields = "the field" if len(names) == 1 else "the fields"
            log.warning(
                "%s: %s: %s %s of its records %s not read: move what should be learnt into the prompt or "
                "the messages, or remove it",
                source.key, source.name, fields, ", ".join(names), "is" if len(names) == 1 else "are",
            )  # fmt: skip


def _warn_of_endless_turns(found: Sequence[Source], tokenizer: Any) -> None:
    """Warn if the chat template ends turns with plain words, at which no generation ends."""
    documents = itertools.chain.from_iterable(source.splits.train for source in found)
    is_written = any(source.stream for source in found) or any(d.prompt or d.messages for d in documents)
    words = conversation.end_in_words(tokenizer) if is_written else None
    if words is not None:
        end = words.splitlines()[0]
        lacking = conversation.tokens_in_words(tokenizer)
        meant = lacking if end.startswith(tuple(lacking)) else [*lacking, end]
        log.warning(
            "the chat template ends assistant turns with %r, which is not a special token of the tokenizer, "
            "so generations will not end there. Make it one with %s, or use a chat_template that ends turns "
            "with eos_token, %r, such as %s",
            end, shlex.quote(f"add_tokens={json.dumps(meant)}"), tokenizer.eos_token,
            " or ".join(chat_template.ENDED_BY_EOS),
        )  # fmt: skip


def _warn_of_left_out(found: Sequence[Source]) -> None:
    """Warn of records from which nothing can be learnt, with the location of the first."""
    for source in found:
        for left in source.left_out:
            log.warning(
                "%s: %s: %s left out of %s%s, with nothing to learn: the first, %s, has %s",
                source.key, source.name, _counted(left.records, "record"), f"{left.of:,}",
                " sampled" if source.stream else "", left.first, left.lacking,
            )  # fmt: skip


def warn_of_repeated(found: Sequence[Source]) -> None:
    """Warn of evaluation documents that are also trained on."""
    for key, count in sources.repeated(found).items():
        log.warning(
            "%s: %s also in data, word for word, and trained on: remove the duplicates from one of the two",
            key, _counted(count, "document"),
        )  # fmt: skip


def _say_what_is_lost(name: str, rows: Sequence[PackedDataset]) -> None:
    truncated = sum(part.statistics.truncated for part in rows)
    dropped = sum(part.statistics.dropped for part in rows)
    cut = f"{_counted(truncated, 'answer')} cut off at {rows[0].sequence_length} tokens" if truncated else ""
    left_out = (
        f"{_counted(dropped, 'document')} left out, as nothing remains of the answer" if dropped else ""
    )
    if cut or left_out:
        log.warning("%s: %s: increase sequence_length", name, ", and ".join(filter(None, [cut, left_out])))
    unfound = sum(part.statistics.unfound for part in rows)
    if unfound:
        log.warning("%s: %s left out, since %s", name, _counted(unfound, "document"), _UNFOUND)
    turns = sum(part.statistics.unfound_turns for part in rows)
    if turns:
        log.warning("%s: %s not found, and not learnt: %s", name, _counted(turns, "assistant turn"), _MARKS)


def _counted(count: int, what: str) -> str:
    return f"1 {what} is" if count == 1 else f"{count:,} {what}s are"


def prompts(
    found: Sequence[Source],
    tokenizer: Any,
    given: Sequence[str] = (),
    positions: int | None = None,
    values: Mapping[str, Any] = NO_VALUES,
) -> tuple[str, ...]:
    """The beginnings of generations: those given, else two held-out questions, or the first words of texts.

    Given prompts go through the chat template, if there is one. If the tokenizer begins every text with a
    token, it is added to prompts that no template wrote.

    Args:
        positions: the model's; a question that leaves no position for an answer is not used.
        values: see `pack`.

    Raises:
        BadInput: the template refuses a question, or a given one leaves no position.
    """
    begin = tokenizer.bos_token if Encoder(tokenizer, "answer").begin else ""
    if given:
        return tuple(_asked(text, tokenizer, begin, positions, values) for text in given)
    held_out = itertools.chain.from_iterable(source.splits.validation for source in found)
    ordered = sorted(held_out, key=lambda document: document.key)
    begun = (_beginning(document, tokenizer, begin, values) for document in ordered)
    return tuple(itertools.islice((text for text in begun if not _fills(text, tokenizer, positions)), 2))


def _asked(text: str, tokenizer: Any, begin: str, positions: int | None, values: Mapping[str, Any]) -> str:
    """A given prompt as the model is asked it. Raises BadInput."""
    if getattr(tokenizer, "chat_template", None):
        chat = Chat((Message("user", text),), values=conversation.as_text(values))
        made = conversation.render(tokenizer, chat, to_be_answered=True)
    else:
        made = f"{begin}{text}"
    if count := _fills(made, tokenizer, positions):
        raise BadInput(
            f"prompts: the one that begins with {text[:30]!r} has {count} tokens, but the model has "
            f"{positions} positions: shorten it"
        )
    return made


def _fills(text: str, tokenizer: Any, positions: int | None) -> int:
    """The number of tokens of a text that leaves no free position; otherwise 0."""
    if positions is None:
        return 0
    count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return count if count >= positions else 0


def _beginning(document: Document, tokenizer: Any, begin: str, values: Mapping[str, Any]) -> str:
    chat = conversation.of(document, tokenizer, values)
    asked = tuple(itertools.takewhile(lambda message: message.role != "assistant", chat.messages))
    if asked:
        return conversation.render(tokenizer, chat._replace(messages=asked), to_be_answered=True)
    text = chat.messages[0].content if chat.messages else document.text
    return begin + (_plainly_asked(document) if document.prompt else " ".join(text.split()[:8]))


def _plainly_asked(document: Document) -> str:
    """A pair's prompt without a chat template, as the exported template writes it."""
    before = f"{document.system}\n\n" if document.system else ""
    return before + PROMPT.format(prompt=document.prompt)


def as_asked(found: Sequence[Source], tokenizer: Any) -> Any:
    """The tokenizer as exported: if pairs were asked with PROMPT, this becomes its chat template."""
    documents = itertools.chain.from_iterable(source.splits.train for source in found)
    if getattr(tokenizer, "chat_template", None) or not any(document.prompt for document in documents):
        return tokenizer
    made = copy.deepcopy(tokenizer)
    begins = bool(Encoder(tokenizer, "answer").begin)
    made.chat_template = ("{{ bos_token }}" if begins else "") + _PROMPT_AS_TEMPLATE
    return made


class Encoder:
    """Turns documents into tokens, and marks which of them are predicted.

    Args:
        tokenizer: a fast one, if there are conversations, or pairs and a chat template.
        loss_on: answer: what the assistant says; last: its last turn; all: every token but the first.
        values: see `pack`.
    """

    def __init__(self, tokenizer: Any, loss_on: LossOn, values: Mapping[str, Any] = NO_VALUES) -> None:
        self._tokenizer, self._loss_on, self._values = tokenizer, loss_on, dict(values)
        self.begin = [tokenizer.bos_token_id] if chat_template.begins(tokenizer) else []
        """The token with which the tokenizer itself begins every text."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines how a document is tokenised."""
        template = getattr(self._tokenizer, "chat_template", None)
        own = [conversation.as_text(self._values)] if self._values else []
        parts = (fingerprint(self._tokenizer), PROMPT, str(template), self._loss_on, str(self.begin), *own)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def __call__(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        """The tokens of each document. Raises BadInput."""
        chats = [conversation.of(document, self._tokenizer, self._values) for document in documents]
        rendered = iter(self._chats([chat for chat in chats if chat.messages]))
        plain = iter(self._plain([d for d, chat in zip(documents, chats, strict=True) if not chat.messages]))
        for chat in chats:
            yield next(rendered if chat.messages else plain)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if not _is_its_backend(self._tokenizer):
            found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            return found
        self._tokenizer("")  # configures its backend for such calls, without truncation or padding
        encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [text.ids for text in encoded]

    def _plain(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        asked = iter(self._ids([_plainly_asked(d) for d in documents if d.prompt]))
        for document, text in zip(documents, self._ids([d.text for d in documents]), strict=True):
            prompt = next(asked) if document.prompt else []
            ids = [*self.begin, *prompt, *text, self._tokenizer.eos_token_id]
            if not document.prompt:
                yield Encoded(ids if text else [], None)
                continue
            silent = len(self.begin) + len(prompt) if self._loss_on != "all" else 0
            yield Encoded(ids, [False] * silent + [bool(text)] * (len(ids) - silent))

    def _chats(self, chats: Sequence[Chat]) -> Iterator[Encoded]:
        if not chats:
            return
        if not self._tokenizer.is_fast:
            raise BadInput(
                "conversations need a fast tokenizer (tokenizer.json), which reports positions in the text"
            )
        texts = [conversation.render(self._tokenizer, chat) for chat in chats]
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        for chat, text, ids, places in zip(
            chats, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if self._loss_on == "all":
                yield Encoded(ids, [True] * len(ids))
            else:
                last = self._loss_on == "last"
                spans, unfound = conversation.answers(self._tokenizer, chat, text, last=last)
                yield Encoded(ids, _within(places, spans, text), unfound)


def _within(places: Sequence[Span], spans: Sequence[Span], text: str) -> list[bool]:
    """Whether each token begins in one of the spans, which are in order.

    A token that begins with the whitespace before a span counts too: " the" where a space was written. If the
    tokenizer locates no spaces (GPT-NeoX), a token of spaces alone is behind them, without a length.
    """
    found = [False] * len(places)
    for begin, end in spans:
        first, last = bisect.bisect_left(places, (begin,)), bisect.bisect_left(places, (end,))
        found[first:last] = [
            to > at or (at > begin and text[at - 1].isspace()) for at, to in places[first:last]
        ]
        if first and places[first - 1][1] > begin and text[places[first - 1][0] : begin].isspace():
            found[first - 1] = True
    return found


def _is_its_backend(tokenizer: Any) -> bool:
    """Whether a tokenizer adds nothing to its backend, which can then produce ids alone, and faster."""
    from transformers import PreTrainedTokenizerFast

    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
        and type(tokenizer).__call__ is PreTrainedTokenizerFast.__call__
    )


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of everything that determines how a text is tokenised."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.sha256(f"{content}\0{special}".encode()).hexdigest()
