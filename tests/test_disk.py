"""What is brought to the disk by a thread: soon, or at once where somebody waits for it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from stoker import Run, disk

from support import LONG, until


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes that were brought to the disk, which they are."""
    found: list[int] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        found.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noting)
    return found


def test_files_and_folders_are_brought_when_it_is_asked_for(tmp_path: Path, synced: list[int]) -> None:
    file = tmp_path / "a"
    file.write_text("content", encoding="utf-8")
    disk.bring_soon(file, tmp_path, tmp_path / "removed since")
    disk.bring()
    assert {file.stat().st_ino, tmp_path.stat().st_ino} <= set(synced)


def test_they_are_brought_within_a_second_or_so_by_themselves(tmp_path: Path, synced: list[int]) -> None:
    file = tmp_path / "a"
    file.touch()
    disk.bring_soon(file)
    until(lambda: file.stat().st_ino in synced)


def test_what_the_thread_could_not_bring_is_said_to_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, asked = os.fsync, threading.Event()

    def failing_once(descriptor: int) -> None:  # as Linux does: it is said once, to whoever asks first
        if not asked.is_set():
            asked.set()
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_once)
    disk.bring_soon(tmp_path)
    assert asked.wait(LONG)
    with pytest.raises(OSError, match="Input/output"):
        disk.bring()
    disk.bring()


def test_a_process_made_by_fork_brings_what_is_its_own(tmp_path: Path) -> None:
    disk.bring_soon(tmp_path)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_bring_in_child, args=(tmp_path,))
    with disk._BRINGER._one:  # as while the thread brings something
        child.start()
    child.join(LONG)
    assert child.exitcode == 0


def _bring_in_child(folder: Path) -> None:
    assert not disk._BRINGER._waiting
    disk.bring_soon(folder)
    disk.bring()
    assert not disk._BRINGER._waiting


def test_all_names_that_lead_to_a_journal_are_brought_before_a_checkpoint_refers_to_it(
    tmp_path: Path, synced: list[int]
) -> None:
    with Run("test", "a", runs=tmp_path / "runs") as run:
        run.log(loss=1.0)
        run.attempt.flush()
        journal = run.directory.journal
        folders = [journal, *list(journal.parents)[:3]]  # the run's, the experiment's, that of all runs
        assert {folder.stat().st_ino for folder in folders} <= set(synced)
