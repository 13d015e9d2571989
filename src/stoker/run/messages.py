"""The library's log messages: to a file of the run and to standard error."""

from __future__ import annotations

import logging
from pathlib import Path

from stoker import redaction, terminal

log = logging.getLogger("stoker")

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def write_to(file: Path) -> list[logging.Handler]:
    """Write log messages to the rank's log file, and warnings to standard error if logging is not set up."""
    handler = logging.FileHandler(file, encoding="utf-8", delay=True)
    handler.setFormatter(_WithoutSecrets(_FORMAT))
    shown = [] if log.hasHandlers() else [ToStderr(logging.WARNING)]
    for added in (handler, *shown):
        log.addHandler(added)
    if log.level != logging.DEBUG:  # setting it clears the level caches of all loggers
        log.setLevel(logging.DEBUG)
    return [handler, *shown]


def write_to_stderr() -> None:
    """Write the messages of all libraries to standard error, which is the log of a background process."""
    handler = logging.StreamHandler()
    handler.setFormatter(_WithoutSecrets(_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _WithoutSecrets(logging.Formatter):
    """Redacts secrets in messages, including their arguments and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redaction.text(super().format(record))


class ToStderr(logging.Handler):
    """Writes to the current standard error, even if it was replaced, as a progress bar does for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "stoker: " if record.levelno < logging.WARNING else f"stoker: {record.levelname.lower()}: "
        terminal.say(f"{prefix}{record.getMessage()}\n")
