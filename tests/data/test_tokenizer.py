"""The tokenizer: lossless, the same in every process, and an ordinary one for transformers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from stoker.data import python_docs
from stoker.data.tokenizer import END_OF_TEXT, PADDING, as_transformers, train_tokenizer
from stoker.errors import BadInput

TRAIN = (
    "import hashlib; from stoker.data import python_docs; from stoker.data.tokenizer import train_tokenizer\n"
    "texts = [python_docs.read_source(file) for _, file in python_docs.modules()[:50]]\n"
    "tokenizer = train_tokenizer(texts, 2000)\n"
    "print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())"
)


def test_training_in_another_process_gives_the_same_bytes() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN], check=True, capture_output=True, text=True)
    here = train_tokenizer((python_docs.read_source(file) for _, file in python_docs.modules()[:50]), 2000)
    assert done.stdout.strip() == hashlib.sha256(here.to_str().encode()).hexdigest()
    assert here.get_vocab_size() == 2000


def test_every_text_comes_back_as_it_was(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    as_transformers(train_tokenizer(["def f(x):\n    return x\n"] * 3, 300), 64).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def f(x):\n    return x\n", "  é 漢字 🚀\t\x00", " 'quoted' , spaced ."):
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == (END_OF_TEXT, END_OF_TEXT, PADDING)
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (0, 1, 64)


def test_a_vocabulary_too_small_for_every_byte_is_refused() -> None:
    with pytest.raises(BadInput, match="vocab_size=257: must be at least 258"):
        train_tokenizer(["text"], 257)
