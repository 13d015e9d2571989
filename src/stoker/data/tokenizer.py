"""Trains a tokenizer: byte-level BPE, which has a token for every byte and so no unknown text.

The same texts give the same tokenizer, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from stoker.errors import BadInput
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
_SMALLEST = 256 + 2  # every byte, and the special tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with `<|endoftext|>` (id 0) and `<|pad|>` (id 1).

    The vocabulary is smaller than requested if the texts have no more pairs to merge.
    Raises BadInput if the requested size cannot hold every byte.
    """
    if vocab_size < _SMALLEST:
        raise BadInput(
            f"vocab_size={vocab_size}: must be at least {_SMALLEST}, for all bytes and 2 special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_transformers(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer in transformers' format, to be saved with `save_pretrained`.

    `max_length` is the number of tokens beyond which transformers warns.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
