"""A causal language model with its tokenizer: a new one of a given size, or one from a directory or the hub.

A loaded model is first created on the meta device, where it takes no memory: the Trainer lays it out over
the ranks, and then has it filled (`Language.load`), each rank its own part.
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
from stoker.language import attention, conversation, hub, rope
from stoker.language import chat_template as templates
from stoker.language.loading import Weights
from stoker.language.rope import UNSCALED, RopeScaling
from stoker.language.shape import SIZES, check_positions
from stoker.words import first_line
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()  # the commands show their own

_LONGEST = 2048  # positions of a new model, unless rows are longer

Load = Callable[[nn.Module, torch.device, str], None]
"""Fills what is on the meta device of a model, below a dotted prefix, on a device."""


def _nothing(model: nn.Module, device: torch.device, prefix: str) -> None:
    """A new model has nothing to load."""


@dataclass(frozen=True)
class Language:
    """A model with its tokenizer."""

    model: Any
    """Without adapters; if `pretrained`, on the meta device."""
    tokenizer: Any
    pretrained: bool
    """Whether it has been trained before."""
    load: Load
    """Fills a model that is on the meta device."""
    origin: Path | str
    """The directory that it is loaded from, or its size."""
    config: Any
    """The model's config as it is written next to its weights."""
    generation_config: Any
    """Written next to the weights too: a generation ends at its `eos_token_id`, see `stop_tokens`."""
    packs: bool
    """Whether its attention can separate several documents in a row."""
    revision: str | None = None
    """The hub revision, if one was given."""
    added_tokens: int = 0
    """The number of its tokens whose embeddings are untrained."""
    rope_scaling: RopeScaling = UNSCALED
    """How its positions differ from those of its `origin`."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """What it was built from: the checksums of its weights (reads all of them), or a size."""
        return hub.fingerprint(self.origin) if isinstance(self.origin, Path) else self.origin


def build(
    reference: str,
    *,
    tokenizer: str | None,
    sequence_length: int,
    vocab_size: int = 0,
    documents: Sequence[Document] = (),
    tie_embeddings: bool = True,
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = None,
    add_tokens: Sequence[str] = (),
    grows: bool = False,
    rope_scaling: RopeScaling = UNSCALED,
    planned: bool = False,
) -> Language:
    """A new model of a given size, or one from a directory or hub id.

    Args:
        reference: a key of SIZES, a local directory, or a hub id.
        tokenizer: a directory or hub id; None: the model's own, or for a new model one with
            `vocab_size` tokens, trained on the documents.
        sequence_length: the longest row, in tokens.
        tie_embeddings: whether a new model shares its embeddings with the output layer.
        dtype: dtype of the weights of a loaded model.
        chat_template: see `chat_template.read`; None: the tokenizer's own.
        add_tokens: special tokens to add to the tokenizer; the model gets embeddings for them.
        grows: the model gets embeddings for all tokens of the tokenizer.
        rope_scaling: how to give a loaded model more positions.
        planned: it will not be filled, so its weights need not exist.

    Raises:
        BadInput: the model does not exist, does not load, or does not match its tokenizer.
    """
    if reference in SIZES:
        made, _ = _tokenizer(tokenizer, documents, vocab_size, chat_template, add_tokens)
        return _new(reference, made, sequence_length, tie_embeddings)
    folder = hub.find(reference, known=tuple(SIZES), weights=not planned)
    config = load_config(folder)
    rope.scale(config, rope_scaling, reference)
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
    return dataclasses.replace(made, revision=revision, added_tokens=added, rope_scaling=rope_scaling)


def without_model(
    reference: str,
    *,
    tokenizer: str | None,
    vocab_size: int,
    documents: Sequence[Document],
    chat_template: str | None = None,
    add_tokens: Sequence[str] = (),
) -> tuple[Any, bool]:
    """The tokenizer that `build` finds or trains, and whether its model packs, without reading weights.

    Raises BadInput like `build`.
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
        size: a key of SIZES, for a new model.
        folder: for an existing one, its directory, from which only the config is read.
    """
    config = LlamaConfig(**SIZES[size]) if folder is None else load_config(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_config(
    folder: Path, kind: Any = AutoModelForCausalLM, no: str = "which is not a causal language model"
) -> Any:
    """The config of a model's directory. Raises BadInput.

    Args:
        kind: the transformers auto class that must support it.
        no: ends the message if it does not.
    """
    hub.read_json(folder, "config.json", "model")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model {folder} cannot be loaded: {first_line(error)}") from error
    if type(config) not in kind._model_mapping:
        raise BadInput(f"model {folder} is a {config.model_type}, {no}")
    if kind is AutoModelForCausalLM and _is_encoder(config):
        raise BadInput(
            f"model {folder} is a {config.model_type} that encodes, not a causal language model: each token "
            "sees those that it would have to predict. `stoker train text` makes a classifier of it"
        )
    return config


def _is_encoder(config: Any) -> bool:
    """Whether a model that transformers loads as a causal one (BERT, RoBERTa) is not, by its config."""
    masked = type(config) in AutoModelForMaskedLM._model_mapping
    return masked and not config.is_encoder_decoder and not getattr(config, "is_decoder", True)


def read_tokenizer(reference: str) -> Any:
    """The tokenizer of a directory or hub id, unchanged. Raises BadInput."""
    folder = hub.find(reference, "tokenizer", weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"the tokenizer of {reference} cannot be loaded: {first_line(error)}") from error


def load_tokenizer(reference: str) -> Any:
    """The tokenizer of a directory or hub id, with a pad token. Raises BadInput."""
    tokenizer = read_tokenizer(reference)
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"the tokenizer of {reference} has no end-of-text token: "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is recognised by its position, never by its token
    return tokenizer


def stop_tokens(tokenizer: Any, generation_config: Any) -> list[int]:
    """The tokens at which a generation ends.

    These are the end-of-text token, the token that ends a turn of the chat template, and those that the
    model's generation config names.
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

    transformers reads configs with sampling parameters but without `do_sample`, yet refuses to write them.
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
        attention.forget_padding(model.config)  # its position is enough
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
    """The tokenizer, and the number of tokens added here."""
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
        raise BadInput(f"{file} cannot be read: {first_line(error)}") from error


def positions(config: Any) -> int | None:
    """The maximum number of tokens of a model, by its config; None if it does not say."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def room(config: Any, begun: int) -> int:
    """How many tokens can follow `begun` tokens. Raises BadInput if none can."""
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
    """Raises BadInput if a tokenizer has tokens for which a model has no embeddings."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise BadInput(
            f"the tokenizer has {len(tokenizer)} tokens, but {reference} has embeddings for only {rows}: "
            "they do not belong together"
        )
