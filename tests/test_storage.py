from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from stoker import disk, storage

HOLD = (
    "import sys, time, os; from pathlib import Path; from stoker import storage\n"
    "lock = storage.try_lock(Path(sys.argv[1])); storage.release_in_children(lock)\n"
    "child = os.fork()\n"
    "if child == 0: print(os.getpid(), flush=True)\n"
    "time.sleep(60)\n"
)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    storage.write_atomically(file, b"old")

    def broken(descriptor: int) -> None:
        raise OSError("disk")

    disk.bring()  # else its thread may be what fails, which says so to a later test
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk"):
        storage.write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("left", [lambda path: path.mkdir(), lambda path: path.touch()])
def test_what_is_new_appears_whole_or_not_at_all(left: Callable[[Path], None], tmp_path: Path) -> None:
    """Args: left: leaves what a killed process might."""
    target, paths = tmp_path / "a", []

    def fail() -> None:
        with storage.new(target) as temporary:
            paths.append(temporary)
            left(temporary)
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()
    assert list(tmp_path.iterdir()) == []
    left(paths[0])
    with storage.new(target) as temporary:
        temporary.mkdir()
        (temporary / "b").touch()
        assert not target.exists()
    assert sorted(tmp_path.rglob("*")) == [target, target / "b"]


def test_processes_that_do_not_see_each_others_locks_make_the_same_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    with storage.new(target) as here:
        here.mkdir()
        (here / "made here").touch()
        monkeypatch.setattr(storage, "reach_of_locks", lambda path: "another machine")
        with storage.new(target) as there:
            there.mkdir()
            (there / "made there").touch()
            assert [file.name for file in here.iterdir()] == ["made here"]
    assert sorted(tmp_path.rglob("*")) == [target, target / "made there"]


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    held = storage.try_lock(file)
    assert held is not None
    assert storage.try_lock(file) is None
    assert storage.is_locked(file)
    os.close(held)
    assert not storage.is_locked(file)


def test_a_lock_goes_with_its_process_though_a_forked_child_lives(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert storage.is_locked(file)
    process.kill()
    process.wait()
    try:
        assert not storage.is_locked(file)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_the_lock_of_a_file_that_was_deleted_meanwhile_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, opened = tmp_path / "lock", os.open

    def deleted_at_once(path: Path, *how: int) -> int:
        descriptor = opened(path, *how)
        monkeypatch.setattr(os, "open", opened)
        file.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", deleted_at_once)
    lock = storage.try_lock(file)
    assert lock is not None
    assert os.path.samestat(os.fstat(lock), file.stat())
    os.close(lock)


def test_linked_folders_are_walked_too(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "b").touch()
    (folder := tmp_path / "folder").mkdir()
    (folder / "a").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "back").symlink_to(tmp_path)
    names = [str(file.relative_to(folder)) for file in storage.files_under(folder)]
    assert names[:1] == ["a"]
    assert "linked/b" in names


def test_no_file_no_lock(tmp_path: Path) -> None:
    assert not storage.is_locked(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_of_two_that_write_a_file_at_once_one_is_last_and_neither_fails(tmp_path: Path) -> None:
    file, contents = tmp_path / "a", (b"a" * 100_000, b"b" * 100_000)

    def write(content: bytes) -> None:
        for _ in range(50):
            storage.write_atomically(file, content)
            assert file.read_bytes() in contents

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, contents))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("links", [True, False])
def test_of_several_that_make_a_file_one_does(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    file = tmp_path / "a"

    def make(number: int) -> bool:
        try:
            storage.write_new(file, str(number).encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    assert [number for number in range(8) if made[number]] == [int(file.read_bytes())]
    assert list(tmp_path.iterdir()) == [file]


def _no_links(source: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")
