"""What is said to whoever looks on: that nobody does any more ends no training.

A pipe whose reader is gone (Ctrl-C ends `tee` too), a terminal that was closed, a disk that is full: what
cannot be written there is lost, and nothing else is.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """Write to what standard error is at the time: a progress bar puts itself in its place for a while."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            sys.stderr.write(text)
            sys.stderr.flush()


class Outlived(io.FileIO):
    """A descriptor to write to, which takes what is written whether it arrives or not."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def outlive() -> None:
    """From now on standard output and error take what is written there, though nobody reads it."""
    sys.stdout, sys.stderr = _outlived(sys.stdout), _outlived(sys.stderr)


def _outlived(stream: Any) -> Any:
    """A stream of the same descriptor; of one that is none of a descriptor (a test's), itself."""
    if stream is None:
        return open_nowhere()
    try:
        stream.flush()
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return stream
    buffered = io.BufferedWriter(Outlived(descriptor))
    return io.TextIOWrapper(
        buffered, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


def open_nowhere() -> Any:
    """A stream for one that was closed before this process was started."""
    return Path(os.devnull).open("w", encoding="utf-8")
