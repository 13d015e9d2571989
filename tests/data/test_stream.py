"""Data that is read while training: each record once, and the same rows from anywhere."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from stoker.data import chunks, stream
from stoker.data.chunks import Chunks
from stoker.data.documents import Document, place
from stoker.data.encoding import Encoded
from stoker.data.loader import Loader
from stoker.data.mixture import Mixture
from stoker.data.stream import Stream
from stoker.data.tokens import NO_LOSS
from stoker.errors import BadInput
from stoker.world import World

HELD_OUT = 0.2


def encode(documents: Sequence[Document]) -> list[Encoded]:
    """A token a character."""
    return [Encoded([ord(c) for c in d.text], None) for d in documents]


def text(number: int) -> str:
    return f"{number:06d}:" + "x" * random.Random(number).randrange(5, 40)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SIZE", 700)


@pytest.fixture
def folder(tmp_path: Path, small_chunks: None) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    write(made / "a.jsonl", range(400))
    write(made / "b.jsonl", range(400, 700))
    table = pa.table({"text": [text(n) for n in range(700, 800)]})
    parquet.write_table(table, made / "c.parquet", row_group_size=30)
    return made


def write(file: Path, numbers: Any) -> None:
    file.write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in numbers))


def opened(found: Chunks, cache: Path, **changed: Any) -> Stream:
    settings: dict[str, Any] = {
        "held_out": HELD_OUT, "encode": encode, "pad_id": 0, "vocab_size": 256, "sequence_length": 64,
        "packing": True, "fingerprint": ("test",), "cache": cache, "sampled": [0, len(found) // 2],
    }  # fmt: skip
    return Stream(found, **{**settings, **changed})


def rows(data: Stream | Mixture, begin: int, end: int, seed: int = 5) -> list[bytes]:
    _, indices = data.order(seed, np.arange(begin, end))
    return [data[index]["input_ids"].tobytes() for index in indices.tolist()]


def documents_in(row: dict[str, Any]) -> list[str]:
    found, at = [], 0
    for length in row["documents"].tolist():
        found.append("".join(map(chr, row["input_ids"][at : at + length].tolist())))
        at += length
    return found


def test_each_record_is_in_exactly_one_chunk(folder: Path) -> None:
    found = chunks.find(str(folder))
    assert [file.chunks > 3 for file in found.files] == [True, True, True]
    read = [d.text for number in range(len(found)) for d in found.documents(number)]
    assert read == [text(n) for n in range(800)]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=80), st.integers(1, 200), st.booleans())
def test_lines_of_any_lengths_are_each_of_one_part(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size: int, ended: bool
) -> None:
    lines = [f"{n}:" + "y" * length for n, length in enumerate(lengths)]
    file = tmp_path_factory.mktemp("lines") / "a.txt"
    file.write_text("\n".join(lines) + ("\n" if ended else ""))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chunks, "SIZE", size)
        patched.setattr(chunks, "_TAIL", 7)
        found = chunks.find(str(file))
        store = chunks.Store(found.folder, "")
        parts = [chunks._lines(store, found.files[0], part) for part in range(len(found))]
    assert b"".join(parts) == file.read_bytes()
    assert all(not part or part.endswith(b"\n") for part in parts[:-1] if any(parts[parts.index(part) + 1 :]))


def test_what_is_kept_of_a_part_is_all_of_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made = [{"messages": turns, "functions": ["f"]}, {"prompt": "a", "completion": "b", "system": "be brief"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    found = chunks.find(str(tmp_path / "a.jsonl"))
    documents = found.kept(0)
    where = [document.where for document in documents]
    assert where == [f"{tmp_path / 'a.jsonl'}, line {n}" for n in (1, 2)]
    assert (documents[0].unread, documents[1].system) == (("functions",), "be brief")
    monkeypatch.setattr(chunks.Chunks, "documents", None)  # it is read from the cache
    assert found.kept(0) == documents
    assert [document.where for document in found.kept(0)] == where


def test_what_comes_later_of_which_nothing_can_be_learnt_is_left_out(
    tmp_path: Path, small_chunks: None
) -> None:
    file = tmp_path / "a.jsonl"
    write(file, range(100))
    silent = {"messages": [{"role": "user", "content": "a" * 50}, {"role": "assistant", "content": ""}]}
    blank = {"prompt": "a", "completion": "   "}
    with file.open("a") as more:
        more.write(f"{json.dumps(silent)}\n{json.dumps(blank)}\n" * 50)
    data = opened(chunks.find(str(file)), tmp_path / "cache", sampled=[0], held_out=0)
    _, indices = data.order(5, np.arange(2 * len(data)))
    seen = {document for index in indices.tolist() for document in documents_in(data[index])}
    assert seen == {text(n) for n in range(100)}


def test_an_epoch_has_each_document_once_but_for_those_held_out(folder: Path, tmp_path: Path) -> None:
    found = chunks.find(str(folder))
    data = opened(found, tmp_path / "cache")
    epochs, indices = data.order(5, np.arange(3 * len(data)))
    first = sorted(
        index for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True) if epoch == 0
    )
    assert len(set(first)) == len(first)
    seen = sorted(d for index in first for d in documents_in(data[index]))
    all_of_them = [d for number in range(len(found)) for d in found.documents(number)]
    assert seen == sorted(d.text for d in all_of_them if place(d.key) >= HELD_OUT)
    assert 600 < len(seen) < 700
    assert abs(len(first) - len(data)) < 0.3 * len(first)


def test_the_order_is_found_again_from_a_place_without_what_was_before(folder: Path, tmp_path: Path) -> None:
    found = chunks.find(str(folder))
    uninterrupted = rows(opened(found, tmp_path / "one"), 0, 900)
    data = opened(found, tmp_path / "one")
    rows(data, 0, 500)
    where = json.loads(json.dumps(data.place(5, 450)))
    resumed = opened(found, tmp_path / "another", sampled=[0])
    resumed.go_to(where)
    assert rows(resumed, 450, 500) == uninterrupted[450:500]
    assert resumed._first == where["group"] > 0
    assert rows(resumed, 0, 900) == uninterrupted  # going back is counting anew


def test_a_seed_changes_the_order_and_shares_what_is_tokenised(folder: Path, tmp_path: Path) -> None:
    found = chunks.find(str(folder))
    data = opened(found, tmp_path / "cache")
    one = rows(data, 0, 300)
    other = rows(opened(found, tmp_path / "cache"), 0, 300, seed=6)
    assert one != other
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_only_the_newest_chunks_are_kept_and_the_others_are_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chunks.find(str(folder))
    expected = rows(opened(found, tmp_path / "all"), 0, 300)
    monkeypatch.setattr(stream, "_KEPT", 3)
    monkeypatch.setattr(stream, "_OPEN", 2)
    monkeypatch.setattr(Stream, "_prepare", lambda self, chunks: None)
    data = opened(found, tmp_path / "few")
    assert [row for begin in range(0, 300, 50) for row in rows(data, begin, begin + 50)] == expected
    data._clear()
    assert len([p for p in next((tmp_path / "few").iterdir()).iterdir() if p.is_dir()]) <= 3


def test_a_chunk_whose_removal_was_cut_short_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chunks.find(str(folder))
    monkeypatch.setattr(Stream, "_prepare", lambda self, chunks: None)
    data = opened(found, tmp_path)
    expected = rows(data, 0, 50)

    def cut_short(path: Path, **options: Any) -> None:
        (path / "meta.json").unlink()

    with monkeypatch.context() as killed:
        killed.setattr(stream, "_KEPT", 0)
        killed.setattr(shutil, "rmtree", cut_short)
        data._clear()
    assert rows(opened(found, tmp_path), 0, 50) == expected
    data._clear()
    assert not list(tmp_path.rglob(".*.gone"))


def test_a_loader_resumes_a_mixture_with_a_stream(folder: Path, tmp_path: Path) -> None:
    found = chunks.find(str(folder))
    world = World(0, 1, 0, 1)

    def loader(cache: str) -> Loader:
        parts = [opened(found, tmp_path / cache), opened(found, tmp_path / cache, sequence_length=32)]
        return Loader(Mixture(parts, [2, 1]), batch_size=4, world=world, seed=5, collate=list)

    def some(batches: Any, count: int) -> list[bytes]:
        return [row["input_ids"].tobytes() for _ in range(count) for row in next(batches)]

    whole = some(loader("one").batches(0), 300)
    interrupted = loader("one")
    some(interrupted.batches(0), 270)
    where = json.loads(json.dumps(interrupted.place(1080)))
    assert where[0]["rows"] > 0
    assert some(loader("two").batches(1080, where), 30) == whole[1080:]


@pytest.mark.soak(small=False)
def test_a_place_of_other_data_is_ignored_by_every_rank(folder: Path, tmp_path: Path) -> None:
    found = chunks.find(str(folder))

    def streamed() -> Stream:
        return opened(found, tmp_path / "cache")

    def loader(data: Any, rank: int = 0, ranks: int = 1) -> Loader:
        return Loader(data, batch_size=4, world=World(rank, ranks, rank, ranks), seed=5, collate=list)

    kinds: dict[str, Callable[[], Any]] = {
        "rows": lambda: streamed()._open(0),
        "stream": streamed,
        "mixed rows": lambda: Mixture([streamed()._open(0), streamed()._open(1)], [2, 1]),
        "mixed": lambda: Mixture([streamed(), streamed()], [2, 1]),
        "one of two": lambda: Mixture([streamed(), streamed()._open(1)], [2, 1]),
        "three": lambda: Mixture([streamed(), streamed(), streamed()], [2, 1, 1]),
    }
    places = {kind: json.loads(json.dumps(loader(make()).place(1200))) for kind, make in kinds.items()}
    for number, (kind, make) in enumerate(kinds.items()):
        alone = loader(make())
        assert {other for other, where in places.items() if alone.knows(where)} == {"rows", kind}
        expected = next(alone.batches(1200))
        for other in (kind, [*kinds][number - 1]):
            halves = [next(loader(make(), rank, 2).batches(1200, places[other])) for rank in range(2)]
            read = [row["input_ids"].tobytes() for half in halves for row in half]
            assert read == [row["input_ids"].tobytes() for row in expected], (kind, other)


def test_workers_that_load_read_the_same_rows(folder: Path, tmp_path: Path) -> None:
    found = chunks.find(str(folder))

    def some(workers: int) -> list[bytes]:
        mixed = Mixture([opened(found, tmp_path / "a"), opened(found, tmp_path / "b", held_out=0.1)], [2, 1])
        loader = Loader(mixed, batch_size=4, world=World(0, 1, 0, 1), seed=5, collate=list, workers=workers)
        batches = loader.batches(120, loader.place(120))
        return [row["input_ids"].tobytes() for _ in range(20) for row in next(batches)]

    assert some(1) == some(0)


def test_parts_that_every_start_looks_at_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    chat = {
        "messages": [{"role": "user", "content": "\N{SNOWMAN}?"}, {"role": "assistant", "content": "yes"}]
    }
    lines = [{"text": text(n)} for n in range(50)] + [{**chat, "n": n} for n in range(3)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = chunks.find(str(file))
    first = found.kept(0)
    assert first == found.documents(0)
    monkeypatch.setattr(Chunks, "documents", None)
    assert found.kept(0) == first
    assert len(opened(found, tmp_path / "rows", sampled=[0])) > 0


def test_labels_and_estimates_are_those_of_rows(folder: Path, tmp_path: Path) -> None:
    data = opened(chunks.find(str(folder)), tmp_path / "cache")
    row = data[int(data.order(1, np.array([0]))[1][0])]
    assert row["labels"][0] == NO_LOSS
    assert 40 < data.tokens_per_sample <= 64
    assert 0.9 < data.labelled < 1
    assert 5 < data.context < 40


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.csv"])
def test_what_is_read_from_its_beginning_only_is_unpacked_once_and_resumed_in_the_same_rows(
    tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "unpacked"))
    write(tmp_path / "plain.jsonl", range(500))
    content = (tmp_path / "plain.jsonl").read_bytes()
    if ".json" in Path(name).suffixes:
        content = json.dumps([json.loads(line) for line in content.splitlines()]).encode()
    if name == "a.csv":
        content = "\n".join(["text", *(f'"{text(n)}"' for n in range(500))]).encode()
    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
    file = tmp_path / name
    file.write_bytes(pa.Codec(codec).compress(content, asbytes=True) if codec else content)
    found = chunks.find(str(file))
    assert len(found) > 5
    read = [d.text for number in range(len(found)) for d in found.documents(number)]
    assert read == [text(n) for n in range(500)]

    monkeypatch.setattr("stoker.data.compressed.lines", None)  # it is not unpacked again
    data = opened(found, tmp_path / "one")
    uninterrupted = rows(data, 0, 500)
    resumed = opened(chunks.find(str(file)), tmp_path / "another")
    resumed.go_to(json.loads(json.dumps(data.place(5, 450))))
    assert resumed._first > 0
    assert rows(resumed, 450, 500) == uninterrupted[450:]


def test_a_file_that_is_unpacked_and_has_changed_is_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.json"
    file.write_text('[{"text": "one"}]')
    before = chunks.find(str(file))
    assert [d.text for d in before.documents(0)] == ["one"]
    file.write_text('[{"text": "two"}]')
    after = chunks.find(str(file))
    assert [d.text for d in after.documents(0)] == ["two"]
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing.parquet"])
def test_what_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="does not exist, or contains no"):
        chunks.find(str(tmp_path / name))
    with pytest.raises(BadInput, match="contains no"):
        chunks.find(str(tmp_path))


def test_a_bad_line_is_named(tmp_path: Path, small_chunks: None) -> None:
    file = tmp_path / "a.jsonl"
    write(file, range(60))
    with file.open("a") as more:
        more.write("{no json\n")
    found = chunks.find(str(file))
    with pytest.raises(BadInput, match=r"a.jsonl, line \d+ of those that start after byte \d+: not JSON"):
        found.documents(len(found) - 1)


def test_no_tokens_in_what_is_looked_at_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", range(3))
    with pytest.raises(BadInput, match="looked at 2 parts, and none contains text"):
        opened(chunks.find(str(tmp_path / "a.jsonl")), tmp_path / "cache", held_out=1.1)
