from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import orjson
import pytest
import stoker
from stoker.errors import BadInput
from stoker.reproduce import data, provenance
from stoker.reproduce.data import Fingerprint, fingerprint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of some files that are not young any more, and a cache of its own."""
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "dataset"
    (made / "inner").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "inner/c.txt"):
        (made / name).write_text(name * 100)
    _age(made)
    return made


def _age(folder: Path) -> None:
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - 100, time.time() - 100))


def test_content_decides_and_not_where_it_stands(folder: Path, tmp_path: Path) -> None:
    found = fingerprint(folder)
    assert (found.bytes, found.files, found.how) == (2_100, 3, "content")
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere") == found
    shutil.copy(folder / "a.txt", tmp_path / "another-name.txt")
    assert fingerprint(tmp_path / "another-name.txt") == fingerprint(folder / "a.txt")


@pytest.mark.parametrize("change", ["content", "name", "border", "more", "less"])
def test_any_change_is_another_fingerprint(folder: Path, change: str) -> None:
    before = fingerprint(folder)
    if change == "content":
        (folder / "a.txt").write_text("A.txt" * 100)
    elif change == "name":
        (folder / "a.txt").rename(folder / "aa.txt")
    elif change == "border":  # the same bytes in a row, divided elsewhere
        whole = (folder / "a.txt").read_text() + (folder / "b.txt").read_text()
        (folder / "a.txt").write_text(whole[:10])
        (folder / "b.txt").write_text(whole[10:])
    elif change == "more":
        (folder / "empty").touch()
    else:
        (folder / "inner" / "c.txt").unlink()
    assert fingerprint(folder).fingerprint != before.fingerprint


def test_a_second_start_reads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(folder)
    monkeypatch.setattr(data, "_read", lambda files: pytest.fail("it was read again"))
    assert fingerprint(folder) == before


def test_a_change_just_now_is_not_taken_from_memory(folder: Path) -> None:
    """A clock may not have moved between two changes that leave the size as it is."""
    (folder / "a.txt").write_text("x" * 500)
    at = time.time_ns() + 10**9 * 3600  # it is young, however slow this machine is
    os.utime(folder / "a.txt", ns=(at, at))
    before = fingerprint(folder)
    (folder / "a.txt").write_text("y" * 500)
    os.utime(folder / "a.txt", ns=(at, at))
    assert fingerprint(folder) != before


def test_much_data_is_sampled_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("WHOLE", 1_000), ("_BLOCKS", 5), ("_BLOCK", 10)):
        monkeypatch.setattr(data, name, size)
    before = fingerprint(folder)
    assert before.how == "sampled"
    ends = {"a.txt": 0, "inner/c.txt": 1_099}  # the first and the last byte of all are looked at
    for name, at in ends.items():
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)
        changed = fingerprint(folder)
        assert changed.fingerprint != before.fingerprint
        before = changed


def test_a_link_back_is_not_followed_for_ever(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    inner = next(path for path in folder.iterdir() if path.is_dir())
    (inner / "up").symlink_to(folder)
    (inner / "above").symlink_to(tmp_path)
    assert fingerprint(folder) == before


def test_an_empty_file_and_an_empty_folder_have_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    found = [fingerprint(tmp_path / name) for name in ("file", "folder")]
    assert [one.files for one in found] == [1, 0]
    assert found[0].fingerprint != found[1].fingerprint


def test_a_run_records_what_its_loop_reads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with stoker.Run("e", "a", runs=tmp_path / "runs") as run:
        assert run.data("train", "dataset") == Path("dataset")
        run.data("glue", "nyu-mll/glue", revision="c0ffee")
        run.log(loss=1.0)
    found = orjson.loads((run.directory.provenance / provenance.DATA).read_bytes())
    assert found["train"] == {
        "path": "dataset", "absolute": str(folder), **vars(fingerprint(folder)),
    }  # fmt: skip
    assert found["glue"] == {"path": "nyu-mll/glue", "revision": "c0ffee", "how": "content"}


def test_data_that_has_changed_since_is_warned_of_and_added(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prints: list[Fingerprint] = []
    for content in ("one", "two", "two", "one"):
        (folder / "a.txt").write_text(content)
        with stoker.Run("e", "a", runs=tmp_path / "runs") as run:
            run.data("train", folder)
            run.log(loss=1.0)  # or its next attempt would be the first
        prints.append(fingerprint(folder))
    assert caplog.text.count("data 'train' has changed since the run began") == 2
    found = orjson.loads((run.directory.provenance / provenance.DATA).read_bytes())["train"]
    assert found["fingerprint"] == prints[0].fingerprint
    assert found["changed"] == [
        {"attempt": 2, "fingerprint": prints[1].fingerprint},
        {"attempt": 4, "fingerprint": prints[3].fingerprint},
    ]  # fmt: skip


def test_a_hub_dataset_of_another_revision_is_data_that_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for revision in ("c0ffee", "c0ffee", "d00d1e"):
        with stoker.Run("e", "a", runs=tmp_path / "runs") as run:
            run.data("glue", "nyu-mll/glue", revision=revision)
            run.log(loss=1.0)
    assert caplog.text.count("has changed since the run began: it was c0ffee and is d00d1e now") == 1
    found = orjson.loads((run.directory.provenance / provenance.DATA).read_bytes())["glue"]
    assert (found["revision"], found["changed"]) == ("c0ffee", [{"attempt": 3, "fingerprint": "d00d1e"}])


def test_data_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(BadInput, match=r"data 'train' cannot be read: .*missing: No such file.*fingerprint="),
        stoker.Run("e", "a", runs=tmp_path / "runs") as run,
    ):
        run.data("train", tmp_path / "missing")
