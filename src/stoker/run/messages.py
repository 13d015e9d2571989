"""The library's messages, beside the run and to whoever started it."""

from __future__ import annotations

import logging
from pathlib import Path

from stoker import redaction, terminal

log = logging.getLogger("stoker")

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def write_to(file: Path) -> list[logging.Handler]:
    """Write the library's messages to the rank's log, and warnings to a script that shows none itself."""
    handler = logging.FileHandler(file, encoding="utf-8", delay=True)
    handler.setFormatter(_WithoutSecrets(_FORMAT))
    shown = [] if log.hasHandlers() else [_Stderr(logging.WARNING)]
    for added in (handler, *shown):
        log.addHandler(added)
    if log.level != logging.DEBUG:  # to set it makes all loggers look up theirs again
        log.setLevel(logging.DEBUG)
    return [handler, *shown]


def write_to_stderr() -> None:
    """Write the messages of all libraries to standard error, which is the log of a process that serves."""
    handler = logging.StreamHandler()
    handler.setFormatter(_WithoutSecrets(_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _WithoutSecrets(logging.Formatter):
    """Keeps secrets out of messages, of their arguments and tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return redaction.text(super().format(record))


class _Stderr(logging.Handler):
    """Writes to what standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        terminal.say(f"stoker: {record.levelname.lower()}: {record.getMessage()}\n")
