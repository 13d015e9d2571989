"""Output to standard output and error that cannot end a training.

If a pipe's reader has ended (Ctrl-C ends `tee` too), the terminal was closed or the disk is full, only the
output is lost.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """Write to the current standard error, which a progress bar replaces while it is shown.

    A signal handler may call it: within a write that the signal has interrupted, the text goes to the
    descriptor.
    """
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except RuntimeError:  # "reentrant call inside <_io.BufferedWriter>"
            os.write(2, text.encode(errors="backslashreplace"))


class Outlived(io.FileIO):
    """A descriptor that ignores errors when writing."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def outlive() -> None:
    """From now on, ignore errors when writing to standard output and error."""
    sys.stdout, sys.stderr = _outlived(sys.stdout), _outlived(sys.stderr)


def _outlived(stream: Any) -> Any:
    """A stream to the same descriptor; a stream without one, as in tests, is returned unchanged."""
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
    """A stream to replace one that was closed before this process started."""
    return Path(os.devnull).open("w", encoding="utf-8")
