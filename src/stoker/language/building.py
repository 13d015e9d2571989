"""A causal language model with its tokenizer: a new one of a size, or one of a directory or of the hub.

One that is loaded stands on the meta device at first, where it takes no memory: the Trainer lays it out
over the ranks, and then has it filled (`Language.load`), each rank its own part.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stoker.data import tokenizer as tokenizers
from stoker.data.documents import Document
from stoker.errors import BadInput
from stoker.language import attention, conversation, hub
from stoker.language import chat_template as templates
from stoker.language.loading import Weights
from stoker.language.shape import SIZES, check_positions
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()  # the commands have one of their own

_LONGEST = 2048  # positions of a new model, unless rows are longer

Load = Callable[[nn.Module, torch.device, str], None]
"""Fills what of a model is on the meta device, below a dotted prefix, on a device."""


def _nothing(model: nn.Module, device: torch.device, prefix: str) -> None:
    """Of a new model, all is there."""


@dataclass(frozen=True)
class Language:
    """A model with its tokenizer."""

    model: Any
    """Bare; one that is `pretrained` is on the meta device."""
    tokenizer: Any
    pretrained: bool
    """Whether it has learnt before."""
    load: Load
    """What fills a model that is on the meta device."""
    origin: Path | str
    """The directory that it is loaded from, or its size."""
    config: Any
    """The model's config as it is written beside its weights."""
    generation_config: Any
    """As it is written beside them: a generation ends at its `eos_token_id`, see `stop_tokens`."""
    packs: bool
    """Whether its attention can keep apart several documents in a row."""
    revision: str | None = None
    """Of the hub, where one was asked for."""
    added_tokens: int = 0
    """How many tokens it has whose embeddings have learnt nothing yet."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what it was built from: the checksums of its weights (all are read), or a size."""
        return hub.fingerprint(self.origin) if isinstance(self.origin, Path) else self.origin


def build(
    reference: str,
    *,
    tokenizer: str | None,
    vocab_size: int,
    sequence_length: int,
    documents: Sequence[Document],
    tie_embeddings: bool = True,
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = None,
    add_tokens: Sequence[str] = (),
    grows: bool = False,
    planned: bool = False,
) -> Language:
    """A new model of a size, or the one of a directory or hub id.

    Args:
        reference: a key of SIZES, a local directory, or a hub id.
        tokenizer: a directory or hub id; None: the model's own, or for a new model one of
            `vocab_size` tokens, trained on the documents.
        sequence_length: the longest row, in tokens.
        tie_embeddings: of a new model, whether it predicts with its embeddings.
        dtype: of the weights of a model that is loaded.
        chat_template: see `chat_template.read`; None: the tokenizer's own.
        add_tokens: special tokens that the tokenizer is to have; the model gets embeddings for them.
        grows: it gets them for all tokens of the tokenizer.
        planned: it is not to be filled: its weights need not be there.

    Raises:
        BadInput: there is no such model, it does not load, or its tokenizer does not fit it.
    """
    if reference in SIZES:
        made, _ = _tokenizer(tokenizer, documents, vocab_size, chat_template, add_tokens)
        return _new(reference, made, sequence_length, tie_embeddings)
    folder = hub.find(reference, known=tuple(SIZES), weights=not planned)
    config = load_config(folder)
    found, added = _tokenizer(tokenizer or str(folder), documents, vocab_size, chat_template, add_tokens)
    config.name_or_path, revision = hub.named(reference, folder)
    text = config.get_text_config()
    known = len(found) - added if added else sys.maxsize if grows else None
    if known is not None:
        text.vocab_size = max(text.vocab_size, len(found))

    def make() -> Any:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)

    load = _nothing if planned else Weights(folder, make, tokens=known).load
    with torch.device("meta"):
        model = make()
    _check_fits(reference, model, found, sequence_length)
    generation = _generation_config(folder, model)
    made = _language(model, found, load, folder, generation)
    return dataclasses.replace(made, revision=revision, added_tokens=added)


def without_model(
    reference: str,
    *,
    tokenizer: str | None,
    vocab_size: int,
    documents: Sequence[Document],
    chat_template: str | None = None,
    add_tokens: Sequence[str] = (),
) -> tuple[Any, bool]:
    """The tokenizer that `build` finds or trains, and whether its model packs; no weights are touched.

    Raises BadInput, as `build`.
    """
    if reference in SIZES:
        kind, config = LlamaForCausalLM, LlamaConfig()
    else:
        folder = hub.find(reference, known=tuple(SIZES), weights=False)
        config = load_config(folder)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
        tokenizer = tokenizer or str(folder)
    made, _ = _tokenizer(tokenizer, documents, vocab_size, chat_template, add_tokens)
    return made, attention.packs(config, bool(kind._supports_attention_backend))


def empty(size: str, folder: Path | None) -> Any:
    """A model on the meta device: its modules, without memory. Raises BadInput.

    Args:
        size: a key of SIZES, of a new model.
        folder: of one that is there, with its config; its weights are not touched.
    """
    config = LlamaConfig(**SIZES[size]) if folder is None else load_config(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_config(
    folder: Path, kind: Any = AutoModelForCausalLM, no: str = "which is not a causal language model"
) -> Any:
    """The config of a model's directory. Raises BadInput.

    Args:
        kind: the auto class of transformers that is to know it.
        no: what is said of one that it does not know.
    """
    hub.read_json(folder, "config.json", "model")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model {folder} cannot be loaded: {hub.first_line(error)}") from error
    if type(config) not in kind._model_mapping:
        raise BadInput(f"model {folder} is a {config.model_type}, {no}")
    return config


def read_tokenizer(reference: str) -> Any:
    """The tokenizer of a directory or hub id, as it is there. Raises BadInput."""
    folder = hub.find(reference, "tokenizer", weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"the tokenizer of {reference} cannot be loaded: {hub.first_line(error)}") from error


def load_tokenizer(reference: str) -> Any:
    """The tokenizer of a directory or hub id, with a pad token. Raises BadInput."""
    tokenizer = read_tokenizer(reference)
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"the tokenizer of {reference} has no end-of-text token: "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is known by its place, never by its token
    return tokenizer


def stop_tokens(tokenizer: Any, generation_config: Any) -> list[int]:
    """Where a generation ends: with what ends texts, what ends a turn of the chat template, and what the
    model's own generation config names.
    """
    own = generation_config.eos_token_id
    ends = [
        tokenizer.eos_token_id,
        conversation.end_of_turn(tokenizer),
        *(own if isinstance(own, list) else [own]),
    ]
    return list(dict.fromkeys(token for token in ends if token is not None))


def that_is_written(generation_config: Any) -> Any:
    """A generation config that can be written.

    transformers reads one that says how to sample but not that it is to, and refuses to write it.
    """
    made = copy.deepcopy(generation_config)
    try:
        made.validate(strict=True)
    except ValueError:
        made.do_sample = True
    return made


def _language(model: Any, tokenizer: Any, load: Load | None, origin: Path | str, generation: Any) -> Language:
    generation = that_is_written(generation)
    generation.eos_token_id = stop_tokens(tokenizer, generation)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    packs = attention.packs(model.config, bool(type(model)._supports_attention_backend))
    if packs:
        model.set_attn_implementation(attention.NAME)
        model.config.pad_token_id = None  # else some look for it in each batch: it is known by its place
    return Language(model, tokenizer, load is not None, load or _nothing, origin, config, generation, packs)


def _new(size: str, tokenizer: Any, sequence_length: int, tie_embeddings: bool) -> Language:
    shape = LlamaConfig(
        **SIZES[size],
        vocab_size=len(tokenizer),
        max_position_embeddings=max(_LONGEST, sequence_length),
        tie_word_embeddings=tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(shape)
    return _language(model, tokenizer, None, size, model.generation_config)


def _tokenizer(
    reference: str | None,
    documents: Sequence[Document],
    vocab_size: int,
    template: str | None,
    add_tokens: Sequence[str],
) -> tuple[Any, int]:
    """The tokenizer, and how many tokens it has got here."""
    made = load_tokenizer(reference) if reference else _train_tokenizer(documents, vocab_size)
    added = made.add_tokens([AddedToken(text, special=True, normalized=False) for text in add_tokens])
    if template is not None:
        made.chat_template = templates.of(template, made)
    return made, added


def _train_tokenizer(documents: Sequence[Document], vocab_size: int) -> Any:
    texts = (d.system + d.prompt + d.text + "".join(m.content for m in d.messages) for d in documents)
    trained = tokenizers.train_tokenizer(texts, vocab_size)
    return tokenizers.as_transformers(trained, max_length=_LONGEST)


def _generation_config(folder: Path, model: Any) -> Any:
    if not (folder / "generation_config.json").is_file():
        return model.generation_config
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        file = folder / "generation_config.json"
        raise BadInput(f"{file} cannot be read: {hub.first_line(error)}") from error


def positions(config: Any) -> int | None:
    """How many tokens a model, by its config, takes at most; None where it does not say."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def room(config: Any, begun: int) -> int:
    """How many tokens may follow so many. Raises BadInput where none may."""
    most = positions(config)
    if most is None:
        return sys.maxsize
    if begun >= most:
        raise BadInput(f"the prompt has {begun} tokens, but the model has {most} positions: shorten it")
    return most - begun


def _check_fits(reference: str, model: Any, tokenizer: Any, sequence_length: int) -> None:
    check_positions(reference, positions(model.config), sequence_length)
    check_vocabulary(reference, model, tokenizer)


def check_vocabulary(reference: str, model: Any, tokenizer: Any) -> None:
    """Raises BadInput where a tokenizer has tokens that a model does not embed."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise BadInput(
            f"the tokenizer has {len(tokenizer)} tokens, but {reference} has embeddings for only {rows}: "
            "they do not belong together"
        )
