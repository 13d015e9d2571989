"""Packing: every token once, no leak between documents, and a cache that is whole or absent."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stoker.data import tokens
from stoker.data.documents import Document
from stoker.data.encoding import Encoded
from stoker.data.tokens import NO_LOSS, PackedDataset, collate, pack, tokenise
from stoker.errors import BadInput
from stoker.storage import cache_folder

from support import LONG

EOS = 0


def encode(documents: Sequence[Document]) -> list[Encoded]:
    """A token a letter: a is 1; loss on the text alone, and on what ends it."""
    return [
        Encoded(
            [ord(letter) - 96 for letter in d.prompt + d.text] + [EOS] * bool(d.text),
            [False] * len(d.prompt) + [True] * (len(d.text) + bool(d.text)) if d.prompt else None,
        )
        for d in documents
    ]


def packed(
    cache: Path, documents: Sequence[tuple[str, str]], length: int = 8, **options: Any
) -> PackedDataset:
    given = [Document(str(i), prompt, text) for i, (prompt, text) in enumerate(documents)]
    settings: dict[str, Any] = {"fingerprint": ("corpus", "train", 0.05), "vocab_size": 27, **options}
    return tokenise(given, encode=encode, pad_id=EOS, sequence_length=length, cache=cache, **settings)


def pieces(dataset: PackedDataset) -> list[tuple[list[int], list[int]]]:
    """Each piece's tokens and labels, padding included, found by where positions restart."""
    found = []
    for row in (dataset[i] for i in range(len(dataset))):
        starts = [*np.flatnonzero(row["position_ids"] == 0).tolist(), dataset.sequence_length]
        for start, end in pairwise(starts):
            found.append((row["input_ids"][start:end].tolist(), row["labels"][start:end].tolist()))
    return found


def test_a_row_holds_tokens_labels_and_positions(tmp_path: Path) -> None:
    row = packed(tmp_path, [("", "abc"), ("d", "e")])[0]
    assert row["input_ids"].tolist() == [1, 2, 3, EOS, 4, 5, EOS, EOS]
    assert row["labels"].tolist() == [NO_LOSS, 2, 3, EOS, NO_LOSS, 5, EOS, NO_LOSS]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert row["documents"].tolist() == [4, 3]
    assert {array.dtype for array in row.values()} == {np.dtype(np.int64)}


def test_a_batch_pads_the_lengths_of_documents_to_a_power_of_two(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [("", "a"), ("", "b"), ("", "c"), ("", "abcdef")], length=7)
    batch = collate([dataset[0], dataset[1]])
    assert batch["documents"].tolist() == [[7, 0, 0, 0], [2, 2, 2, 0]]
    assert batch["input_ids"].shape == (2, 7)


def test_a_long_text_is_cut_in_consecutive_pieces(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [("", "abcdefghijk")], length=4)
    assert [piece for piece, _ in pieces(dataset)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, EOS]]
    assert all(labels[0] == NO_LOSS for _, labels in pieces(dataset))


def test_a_last_piece_of_one_token_is_left_out(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [("", "abcd")], length=4)
    assert [piece for piece, _ in pieces(dataset)] == [[1, 2, 3, 4]]


def test_a_pair_has_its_loss_on_the_answer_alone(tmp_path: Path) -> None:
    ((piece, labels), *_) = pieces(packed(tmp_path, [("abc", "de")]))
    assert piece == [1, 2, 3, 4, 5, EOS]
    assert labels == [NO_LOSS, NO_LOSS, NO_LOSS, 4, 5, EOS]


def test_an_answer_is_truncated_and_a_prompt_that_fills_a_row_is_dropped(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [("ab", "cdefgh"), ("abcd", "e"), ("abc", "d")], length=4)
    assert [piece for piece, _ in pieces(dataset)] == [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert (dataset.statistics.truncated, dataset.statistics.dropped) == (2, 1)


def test_what_was_cut_off_is_told_from_what_was_not_found(tmp_path: Path) -> None:
    silent = [Encoded([1, 2, 3, 4], [False] * 4, 2), Encoded([1, 2, 3, 4], [False] * 3 + [True], 1)]
    given = {"pad_id": EOS, "vocab_size": 27, "sequence_length": 3, "cache": tmp_path, "fingerprint": ()}
    found = [*silent, silent[0], Encoded([1, 2, 3], None), Encoded([1, 2], [False, True], 2)]
    documents = [Document(str(n), "", "text") for n in range(len(found))]
    statistics = tokenise(documents, encode=lambda _: found, **given).statistics
    assert (statistics.rows, statistics.dropped, statistics.unfound) == (2, 1, 2)
    assert statistics.unfound_turns == 3
    said = "nothing to predict in their first 3 tokens, 2 nothing at all"
    with pytest.raises(BadInput, match=f"{said}.: increase sequence_length"):
        tokenise(documents[:3], encode=lambda _: found[:3], **{**given, "fingerprint": (1,)})
    with pytest.raises(BadInput, match=r"2 nothing at all\): use different data"):
        tokenise(documents[:2], encode=lambda _: [silent[0]] * 2, **{**given, "fingerprint": (2,)})


def test_texts_without_tokens_are_skipped(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [("", ""), ("a", ""), ("", "b")])
    assert dataset.statistics.tokens == 2


def test_statistics_count_real_tokens(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [("", "abc"), ("d", "e"), ("", "abcdefg")])
    assert (len(dataset), dataset.statistics.tokens, dataset.loss_tokens) == (2, 15, 3 + 2 + 7)
    assert dataset.tokens_per_sample == 7.5
    assert dataset.statistics.efficiency == 15 / 16


@given(st.lists(st.integers(1, 30), min_size=1, max_size=120))
def test_packing_keeps_every_piece_once_within_the_capacity(lengths: list[int]) -> None:
    of = np.array(lengths, np.int32)
    placed, counts = pack(of, 30)
    assert sorted(placed.tolist()) == list(range(len(lengths)))
    assert all(of[row].sum() <= 30 for row in np.split(placed, np.cumsum(counts)[:-1]))
    assert [array.tolist() for array in pack(of, 30)] == [placed.tolist(), counts.tolist()]


def test_packing_many_pieces_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 257, 20_000, dtype=np.int32)
    _, counts = pack(lengths, 256)
    assert lengths.sum() / (256 * len(counts)) > 0.99


@settings(max_examples=40)
@given(texts=st.lists(st.text(alphabet="abcxyz", min_size=1, max_size=25), min_size=1, max_size=30))
def test_all_text_is_in_the_rows(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    dataset = packed(tmp_path_factory.mktemp("cache"), [("", text) for text in texts], length=6)
    found = [token for piece, _ in pieces(dataset) for token in piece if token != EOS]
    assert sorted(found) == sorted(ord(letter) - 96 for text in texts for letter in text)
    for piece, labels in pieces(dataset):
        assert labels[0] == NO_LOSS
        assert labels[1:] == piece[1:] or set(piece) == {EOS}


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(27, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)]
)
def test_tokens_are_stored_as_small_as_the_vocabulary_allows(
    tmp_path: Path, vocab_size: int, dtype: type[np.generic]
) -> None:
    dataset = packed(tmp_path, [("", "abc")], vocab_size=vocab_size)
    assert np.load(dataset.folder / "tokens.npy", mmap_mode="r").dtype == dtype


def test_what_is_tokenised_once_is_not_tokenised_again(tmp_path: Path) -> None:
    first = packed(tmp_path, [("", "abc")])
    again = packed(tmp_path, [("", "other words")])
    assert again.folder == first.folder
    assert again[0]["input_ids"].tolist() == first[0]["input_ids"].tolist()


@pytest.mark.parametrize(
    "other", [{"length": 9}, {"fingerprint": ("corpus", "test", 0.05)}, {"vocab_size": 70_000}]
)
def test_another_fingerprint_is_another_dataset(tmp_path: Path, other: dict[str, Any]) -> None:
    assert packed(tmp_path, [("", "abc")]).folder != packed(tmp_path, [("", "abc")], **other).folder


def test_a_dataset_goes_to_a_worker_as_its_path(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [("", "abc" * 5000)])
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert pickle.loads(content)[3]["input_ids"].tolist() == dataset[3]["input_ids"].tolist()


def test_a_row_that_is_not_there_is_an_index_error(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        packed(tmp_path, [("", "abc")])[1]


def test_a_kill_while_tokenising_leaves_nothing_half_made(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, json\n"
        "from pathlib import Path\n"
        "from stoker import storage\n"
        "from stoker.data import tokens\n"
        "from stoker.data.documents import Document\n"
        "from stoker.data.encoding import Encoded\n"
        "storage.write_atomically = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tokens.tokenise([Document('0', '', 'abc')], encode=lambda t: [Encoded([1, 2, 3], None)], pad_id=0,\n"
        "    vocab_size=27, sequence_length=8, fingerprint=('corpus', 'train', 0.05),\n"
        "    cache=Path(sys.argv[1]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert [p.suffix for p in tmp_path.iterdir() if p.is_dir()] == [".tmp"]
    dataset = packed(tmp_path, [("", "abc")])
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == [dataset.folder]
    assert dataset[0]["input_ids"].tolist() == [1, 2, 3, 0, 0, 0, 0, 0]


def test_a_kill_while_several_processes_tokenise_ends_them_and_leaves_nothing_half_made(
    tmp_path: Path,
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from stoker.data import encoding, tokens\n"
        "from stoker.data.documents import Document\n"
        "def encode(documents):\n"
        "    time.sleep(0.2 * ('slow' in sys.argv))\n"
        "    return [encoding.Encoded([ord(c) for c in d.text], None) for d in documents]\n"
        "if __name__ == '__main__':\n"
        "    encoding._DOCUMENTS = 5\n"
        "    documents = [Document(str(n), '', 'abc' * n) for n in range(1, 1001)]\n"
        "    made = tokens.tokenise(documents, encode=encode, pad_id=0, vocab_size=128, workers=2,\n"
        "        sequence_length=16, fingerprint=(), cache=Path('cache'))\n"
        "    print(made.statistics.tokens)\n"
    )
    process = subprocess.Popen([sys.executable, str(script), "slow"], cwd=tmp_path)
    while not any(file.stat().st_size for file in tmp_path.glob("cache/.*.tmp/encoded")):
        assert process.poll() is None
        time.sleep(0.02)
    others = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(others) >= 2
    assert not psutil.wait_procs(others, timeout=LONG)[1]
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir() and p.suffix != ".tmp"]
    again = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, check=True)
    assert int(again.stdout) == sum(3 * n - (3 * n % 16 == 1) for n in range(1, 1001))
    (folder,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert PackedDataset(folder).lengths.tolist() == [3 * n for n in range(1, 1001)]


def test_two_processes_at_once_make_one_dataset(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from stoker.data import tokens\n"
        "from stoker.data.documents import Document\n"
        "from stoker.data.encoding import Encoded\n"
        "print(len(tokens.tokenise([Document('0', '', 'a' * 10**6)], pad_id=0, vocab_size=27,\n"
        "    encode=lambda ds: [Encoded([ord(c) for c in d.text], None) for d in ds], sequence_length=16,\n"
        "    fingerprint=(), cache=Path(sys.argv[1]))))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["62500", "62500"]
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_a_sequence_too_short_to_predict_anything_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(BadInput, match=f"sequence_length={length}: must be at least 2"):
        packed(tmp_path, [("", "abc")], length=length)


def test_nothing_left_is_refused_and_leaves_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no tokens are left of 2 documents \(1 have nothing to predict"):
        packed(tmp_path, [("", ""), ("abcdefgh", "i")])
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"is not writable \(.*\): set STOKER_CACHE"):
        packed(tmp_path / "file" / "cache", [("", "abc")])


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("STOKER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/stoker")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(os.environ["HOME"]) / ".cache" / "stoker"


def test_no_document_of_a_row_sees_another(tmp_path: Path) -> None:
    """A packed row gives each document the logits it has alone, in a model as recipes call it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=27, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=32, attn_implementation="sdpa",
            )
        ).eval()  # fmt: skip
    dataset = packed(
        tmp_path, [("", "abcdefghij"), ("kl", "mn"), ("", "opq"), ("", "rstuvwxyzabc"), ("", "yz")], length=20
    )
    batch = collate([dataset[0], dataset[1]])
    assert (batch["position_ids"][0] != batch["position_ids"][1]).any()
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=None,
            use_cache=False,
        ).logits  # (batch, seq, vocab)
        for row in range(2):
            starts = [*torch.nonzero(batch["position_ids"][row] == 0).flatten().tolist(), 20]
            for start, end in pairwise(starts):
                document = batch["input_ids"][row : row + 1, start:end]
                alone = model(input_ids=document, use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, start:end], alone, rtol=1e-5, atol=1e-5)


def test_the_format_is_part_of_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = packed(tmp_path, [("", "abc")])
    monkeypatch.setattr(tokens, "FORMAT", tokens.FORMAT + 1)
    assert packed(tmp_path, [("", "abc")]).folder != before.folder
