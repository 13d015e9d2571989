"""Documents as tokens, and which of these are predicted.

Conversations are written with the tokenizer's chat template, and so are pairs if there is one.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from stoker.data.documents import Document
from stoker.data.encoding import Encoded
from stoker.errors import BadInput
from stoker.language import chat_template, conversation
from stoker.language.conversation import NO_VALUES, Chat, Span

PROMPT = "### Question\n{prompt}\n\n### Answer\n"
"""The format of a pair's prompt if the tokenizer has no chat template."""

LossOn = Literal["answer", "last", "all"]


class Encoder:
    """Turns documents into tokens, and marks which of them are predicted.

    Args:
        tokenizer: a fast one, if there are conversations, or pairs and a chat template.
        loss_on: answer: what the assistant says; last: its last turn; all: every token but the first.
        values: values for the chat template, see `conversation.of`.
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
        asked = iter(self._ids([plainly_asked(d) for d in documents if d.prompt]))
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


def plainly_asked(document: Document) -> str:
    """A pair's prompt without a chat template, as the exported template writes it."""
    before = f"{document.system}\n\n" if document.system else ""
    return before + PROMPT.format(prompt=document.prompt)


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
