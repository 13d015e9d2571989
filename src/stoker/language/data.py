"""The data of the llm recipe: documents, their splits, and packed rows of tokens.

Conversations are written with the tokenizer's chat template, and so are pairs if there is one. The model
learns what the assistant says, with the token that ends it, or everything.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stoker import storage
from stoker.data import sources, tokens
from stoker.data.documents import Document, Message, make_corpus
from stoker.data.mixture import Mixture
from stoker.data.sources import Source
from stoker.data.stream import Stream
from stoker.data.tokens import PackedDataset
from stoker.errors import BadInput
from stoker.language import conversation, data_messages
from stoker.language.conversation import NO_VALUES, Chat
from stoker.language.encoder import Encoder, LossOn, plainly_asked
from stoker.language.rows import Rows

log = logging.getLogger("stoker")

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
    packed = _Packer(
        found, tokenizer, sequence_length=sequence_length, loss_on=loss_on, packing=packing, values=values
    )

    def trained_on(source: Source) -> PackedDataset | Stream:
        if source.stream is None:
            return packed(source, "train")
        name = _named(found, source, "sampled part")
        with _naming(name):
            made = Stream(
                source.stream, held_out=source.held_out, sampled=sources.looked_at(source.stream),
                fingerprint=(source.fingerprint, packed.encoder.fingerprint), **packed.settings,
            )  # fmt: skip
        data_messages.say_what_is_lost(name, made.looked_at())
        return made

    trained = [source for source in found if source.key == "data"]
    parts = [trained_on(source) for source in trained]
    return Rows(
        train=Mixture(parts, [source.weight for source in trained]) if len(parts) > 1 else parts[0],
        validation={s.name: packed(s, "validation") for s in found if s.splits.validation},
        test={s.name: packed(s, "test") for s in found if s.splits.test},
        encoding=packed.encoder.fingerprint,
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
    packed = _Packer(
        found, tokenizer, sequence_length=sequence_length, loss_on=loss_on, packing=packing, values=values
    )
    return {source.name: packed(source, "validation", source.name) for source in found}


class _Packer:
    """Packs the splits of some sources; see `pack`. Warns about all of them first."""

    def __init__(
        self,
        found: Sequence[Source],
        tokenizer: Any,
        *,
        sequence_length: int,
        loss_on: LossOn,
        packing: bool,
        values: Mapping[str, Any],
    ) -> None:
        data_messages.warn(found, tokenizer)
        self._found = found
        self.encoder = Encoder(tokenizer, loss_on, values)
        self.settings: dict[str, Any] = {
            "encode": self.encoder, "pad_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer),
            "sequence_length": sequence_length, "packing": packing, "cache": storage.cache_folder(),
        }  # fmt: skip
        """Those that `tokens.tokenise` and `Stream` share."""

    def __call__(self, source: Source, split: str, name: str | None = None) -> PackedDataset:
        """Tokenise and pack one split of a source, from the cache if it is there.

        Args:
            name: what messages call it, if not by its split.
        """
        documents: list[Document] = getattr(source.splits, split)
        corpus = make_corpus(documents, split).fingerprint
        name = name or _named(self._found, source, split)
        with _naming(name):
            made = tokens.tokenise(documents, fingerprint=(corpus, self.encoder.fingerprint), **self.settings)
        data_messages.say_what_is_lost(name, [made])
        return made


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
        unfound = f"; in {error.unfound:,} {data_messages.UNFOUND}" if error.unfound else ""
        raise BadInput(f"{name}: {error}{unfound}") from error


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
    return begin + (plainly_asked(document) if document.prompt else " ".join(text.split()[:8]))


def as_asked(found: Sequence[Source], tokenizer: Any) -> Any:
    """The tokenizer as exported: if pairs were asked with PROMPT, this becomes its chat template."""
    documents = itertools.chain.from_iterable(source.splits.train for source in found)
    if getattr(tokenizer, "chat_template", None) or not any(document.prompt for document in documents):
        return tokenizer
    made = copy.deepcopy(tokenizer)
    begins = bool(Encoder(tokenizer, "answer").begin)
    made.chat_template = ("{{ bos_token }}" if begins else "") + _PROMPT_AS_TEMPLATE
    return made
