"""The uploader of a job: a process next to its launchers that uploads the output of all nodes.

The nodes share the job's folder, and write their logs there; for a target that keeps logs itself, such as
Ray, there is a link to them (`beside`). Complete lines are appended to copies in `logs/`, without secrets;
the copies are uploaded in stretches, as a run is (`run/uploader.py`). Its standard input is held open by
the writers; once that is closed, it ends when everything is in the store, or some seconds later at the
latest. If it is killed, the uploader of the job's next attempt continues.

    python -m stoker.launch.job_uploader [--patience SECONDS] JOB_FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from stoker import object_store, redaction, signals, storage
from stoker.launch import jobs, ranks
from stoker.object_store import Store, Stored
from stoker.run import messages, stretches, uploader

KEPT = "job.log"
"""In a job's folder: a link to the log that the target keeps."""
PATIENCE = 30
"""Seconds for which a store that does not answer can delay the end of a job."""


class Growing:
    """The logs of a job on this machine, which grow until standard input is closed.

    Args:
        folder: the job's folder.
        patience: seconds after which this process ends then, whatever it waits for.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        self.path = folder / jobs.LOGS
        self._patience = patience
        self._whole = threading.Event()
        threading.Thread(target=self._wait, name="job-over", daemon=True).start()

    @property
    def trained_here(self) -> bool:
        return not self._whole.is_set()

    def exists(self) -> bool:
        return self.path.is_dir()

    def _wait(self) -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        self._whole.set()
        time.sleep(self._patience)
        os._exit(1)


class JobLogs:
    """The logs of a job in its object store."""

    newest: int | None = None

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder, self._store = folder, store
        self._base = f"{jobs.FOLDER}/{folder.name}"
        self._there: dict[str, Stored] | None = None
        self._copied: dict[str, int] = {}
        """The number of bytes of each log that its copy has, by name."""

    def push(self) -> None:
        """Upload what is new. Raises Unreachable."""
        # The file that says that the job ended is read first, ...
        copies = [self._copy(log) for log in written(self._folder)]
        if self._there is None:
            found = self._store.objects(self._base)
            self._there = {key.removeprefix(f"{self._base}/"): stored for key, stored in found.items()}
        known = stretches.known(jobs.LOGS, self._there)
        for copy in reversed(copies):  # ... and uploaded last: then everything else is there
            of_file = known.get(copy.name, [])
            stretches.push(self._store, self._base, jobs.LOGS, copy, of_file, self._there)

    def forget(self) -> None:
        """Check again what is in the store."""
        self._there = None

    def _copy(self, log: Path) -> Path:
        """Append the complete new lines of a log to its copy; returns the copy."""
        copy = self._folder / jobs.LOGS / log.name
        begin = self._copied.pop(log.name, None)  # counted again, for example after a full disk
        if begin is None:
            begin = _copied(log, copy)
        with log.open("rb") as source, copy.open("ab") as target:
            source.seek(begin)
            lines, end, _ = source.read().rpartition(b"\n")
            target.write(_without_secrets(lines + end))
        self._copied[log.name] = begin + len(lines + end)
        return copy


@contextlib.contextmanager
def beside(folder: Path | None, log: Path) -> Iterator[None]:
    """Within this block, upload a log that is kept elsewhere, as one of a job's logs.

    Errors are reported, and stop nothing.

    Args:
        folder: the job's, in the working copy of an object store; None if its runs are not in one.
        log: a file that this process, or another one, writes.
    """
    process = None
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            link = folder / KEPT
            link.unlink(missing_ok=True)
            link.symlink_to(log)
            command = [sys.executable, "-P", "-m", "stoker.launch.job_uploader", str(folder)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE)
    except OSError as error:
        sys.stderr.write(f"stoker: {log} is not uploaded to the object store: {error}\n")
    try:
        yield
    finally:
        if process is not None:
            process.communicate()


def written(folder: Path) -> list[Path]:
    """The files in a job's folder that its nodes write: the record of its attempts, then their logs."""
    found = (file for suffix in jobs.WRITTEN for file in sorted(folder.glob(f"*{suffix}")))
    return [file for file in found if file.is_file()]


def _copied(log: Path, copy: Path) -> int:
    """The number of bytes of a log in its copy, by number of lines. Removes a partial line from the copy."""
    content = copy.read_bytes() if copy.is_file() else b""
    lines = content.count(b"\n")
    if not content.endswith(b"\n"):
        copy.write_bytes(content[: content.rfind(b"\n") + 1])
    with log.open("rb") as source:
        return sum(len(line) for line, _ in zip(source, range(lines), strict=False))


def _without_secrets(lines: bytes) -> bytes:
    """Lines without secrets, keeping their number; a secret such as a private key can span lines."""
    cleaned = redaction.text(lines.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    return cleaned + b"\n" * (lines.count(b"\n") - cleaned.count(b"\n"))  # lines are counted, see `_copied`


def main() -> int:
    """The uploader's process. Returns 0 if everything is in the store, else 1."""
    for number in signals.STATUS:  # meant for the training processes
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="stoker.launch.job_uploader")
    parser.add_argument("folder", type=Path, help="the job's folder")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="in seconds")
    given = parser.parse_args()
    folder: Path = given.folder
    os.nice(19)
    store = object_store.of(folder.parent.parent)
    if store is None:
        raise SystemExit(f"{folder} does not belong to an object store")
    logs = Growing(folder, given.patience)
    ranks.log_to(logs.path / "uploader.log")
    messages.write_to_stderr()
    copy = JobLogs(folder, dataclasses.replace(store, patience=uploader.TRY))
    with storage.locked(logs.path / "store.lock", timeout=math.inf):  # by one in its last seconds, say
        return 0 if uploader.upload(logs, copy) else 1


if __name__ == "__main__":
    sys.exit(main())
