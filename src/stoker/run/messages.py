"""The library's messages, beside the run and to whoever started it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

log = logging.getLogger("stoker")


def write_to(file: Path) -> list[logging.Handler]:
    """Write the library's messages to the rank's log, and warnings to a script that shows none itself."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    shown = [] if log.hasHandlers() else [_Stderr(logging.WARNING)]
    for added in (handler, *shown):
        log.addHandler(added)
    log.setLevel(logging.DEBUG)
    return [handler, *shown]


class _Stderr(logging.Handler):
    """Writes to what standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"stoker: {record.levelname.lower()}: {record.getMessage()}\n")
