from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from stoker.run import journal
from stoker.run.journal import Cursor, JournalWriter
from stoker.tracking import feed


def _writer(folder: Path, attempt: int = 1) -> JournalWriter:
    return JournalWriter(folder / f"attempt-{attempt:04d}.rank-0.jsonl")


def test_reads_what_was_appended_in_the_order_of_attempts(tmp_path: Path) -> None:
    second, first = _writer(tmp_path, 2), _writer(tmp_path, 1)
    second.append("metrics", step=2)
    first.append("metrics", step=1)
    assert [(e["attempt"], e["step"]) for e in journal.read(tmp_path)] == [(1, 1), (2, 2)]


def test_a_torn_last_line_is_skipped_and_read_once_it_is_whole(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.append("metrics", step=1)
    line = writer.file.read_bytes()
    writer.file.write_bytes(line + line[:-5])
    cursor = Cursor()
    assert len(list(journal.read(tmp_path, cursor))) == 1
    writer.file.write_bytes(line + line)
    assert len(list(journal.read(tmp_path, cursor))) == 1
    assert not list(journal.read(tmp_path, cursor))


@pytest.mark.parametrize("cut", range(1, 30))
def test_any_cut_loses_the_last_event_only(tmp_path: Path, cut: int) -> None:
    writer = _writer(tmp_path)
    for step in range(3):
        writer.append("metrics", step=step)
    writer.file.write_bytes(writer.file.read_bytes()[:-cut])
    assert [e["step"] for e in journal.read(tmp_path)] == [0, 1]


@pytest.mark.parametrize("last", ["", "torn", "x" * 10_000, "no event\n", "no event\n" + "x" * 4096, "\n"])
def test_where_a_reader_comes_to_is_known_without_reading(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, cursor = _writer(tmp_path), Cursor()
    for step in range(3):
        writer.append("metrics", step=step)
    _writer(tmp_path, 2)
    with writer.file.open("a") as file:
        file.write(last)
    assert len(list(journal.read(tmp_path, cursor))) == 3
    monkeypatch.delattr(journal, "_parse")
    assert feed.position(feed.end(tmp_path)) == feed.position(cursor)


def test_a_cursor_continues_where_a_limit_stopped(tmp_path: Path) -> None:
    writer, cursor = _writer(tmp_path), Cursor()
    for step in range(5):
        writer.append("metrics", step=step)
    read = [[e["step"] for e in journal.read(tmp_path, cursor, limit=2)] for _ in range(4)]
    assert read == [[0, 1], [2, 3], [4], []]


def test_every_attempt_has_a_file_of_its_own(tmp_path: Path) -> None:
    numbers = [journal.start_attempt(tmp_path)[0] for _ in range(3)]
    assert numbers == [1, 2, 3]


def test_non_finite_values_survive(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1 + 0.2}
    writer.append("metrics", step=1, values=journal.encode_values(values))
    (event,) = journal.read(tmp_path)
    found = journal.decode_values(event["values"])
    assert math.isnan(found["a"])
    assert found["b"] == math.inf
    assert found["c"] == -math.inf
    assert found["d"] == 0.1 + 0.2


def test_appends_survive_sigkill_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stoker.run import journal\n"
        "number, writer = journal.start_attempt(Path(sys.argv[1]))\n"
        "for step in range(10**9):\n"
        "    writer.append('metrics', step=step); print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(1000):
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = [e["step"] for e in journal.read(tmp_path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > said


def test_a_full_disk_raises_and_keeps_later_events_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = _writer(tmp_path)
    writer.append("metrics", step=1)
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 10:
            return real(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    long = "x" * 15
    with pytest.raises(OSError, match="No space left"):
        # the first ten bytes go through, ten more, then the disk is full
        writer.append("x", text=long)
    monkeypatch.setattr(os, "write", real)
    writer.append("metrics", step=2)
    assert [e["step"] for e in journal.read(tmp_path)] == [1, 2]


def test_a_line_that_was_cut_in_two_is_put_together_before_another_thread_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, real, cut = _writer(tmp_path), os.write, threading.Event()
    other = threading.Thread(target=writer.append, args=("metrics",), kwargs={"step": 2, "values": {}})

    def short_once(descriptor: int, data: bytes) -> int:  # as where a disk is full, and has room again
        if cut.is_set():
            return real(descriptor, data)
        cut.set()
        written = real(descriptor, data[:10])
        other.start()
        other.join(0.5)
        return written

    monkeypatch.setattr(os, "write", short_once)
    writer.append_values(1, {"loss": 1.0})
    other.join()
    assert [e["step"] for e in journal.read(tmp_path)] == [1, 2]


def test_what_did_not_come_to_the_disk_is_not_there_for_those_who_ask_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def failing_once(descriptor: int) -> None:  # as Linux does: it is said once to each open file
        told.append(descriptor)
        if len(told) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing_once)
    writer = _writer(tmp_path)
    writer.append("metrics", step=1)
    for _ in range(2):  # the thread that syncs it, and then a checkpoint that refers to it
        with pytest.raises(OSError, match="Input/output"):
            writer.sync()
