"""The data of the language recipe: documents, their splits, and packed rows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stoker import storage
from stoker.data import tokens
from stoker.data.documents import Document, Splits, make_corpus

PROMPT = "### Question\n{prompt}\n\n### Answer\n"


@dataclass(frozen=True)
class Packed:
    """Rows of tokens for each use."""

    train: tokens.PackedDataset
    validation: tokens.PackedDataset
    test: tokens.PackedDataset


def framed(prompt: str) -> str:
    """A question as the model sees it; a text's beginning stays as it is."""
    return PROMPT.format(prompt=prompt) if prompt else ""


def prompts(documents: Sequence[Document]) -> tuple[str, ...]:
    """What two generations begin with: questions of the documents, or the first words of texts."""
    chosen = sorted(documents, key=lambda document: document.key)[:2]
    return tuple(framed(d.prompt) or " ".join(d.text.split()[:8]) for d in chosen)


def pack(splits: Splits, tokenizer: Any, *, sequence_length: int) -> Packed:
    """Tokenise and pack each split, once for the same content, tokenizer and length. Raises BadInput."""
    packed = {
        name: tokens.tokenise(
            [Document(d.key, framed(d.prompt), d.text) for d in documents],
            encode=lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"],
            eos_id=tokenizer.eos_token_id,
            vocab_size=len(tokenizer),
            sequence_length=sequence_length,
            fingerprint=(make_corpus(documents, name).fingerprint, fingerprint(tokenizer), PROMPT),
            cache=storage.cache_folder(),
        )
        for name, documents in vars(splits).items()
    }
    return Packed(**packed)


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides how a text is tokenised."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()
