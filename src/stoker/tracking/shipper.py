"""The shipper: ships one run's journal to one sink, a batch at a time.

Its state is the ledger. After any failure it discards everything else and does what a new process would do:
it opens the sink, reads the journal up to the position in the ledger, and continues from there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from stoker import storage
from stoker.errors import StokerError
from stoker.run.directory import RunDirectory
from stoker.run.journal import Cursor
from stoker.tracking import feed, ledger, store
from stoker.tracking.feed import Feed
from stoker.tracking.sink import Sink

log = logging.getLogger(__name__)


class Shipper:
    """Ships a run to the sink made by `create`; `file` is the ledger, whose lock the caller holds."""

    def __init__(self, directory: RunDirectory, file: Path, create: Callable[[RunDirectory], Sink]) -> None:
        self._directory = directory
        self._file = file
        self._create = create
        self._ledger = ledger.load(file)
        self._open: tuple[Sink, Feed] | None = None
        self._on_disk: dict[str, int] = {}
        """Size of each journal file at its last fsync."""
        self._ledger.recovered()  # clears the failure of the last follower
        with contextlib.suppress(OSError):  # a full disk: it is saved again before anything is shipped
            self._ledger.save(file)

    def ship_next(self, until: Cursor | None = None) -> bool:
        """Ship the next batch, with nothing past `until`; returns whether there was one.

        Raises whatever the sink raises.
        """
        sink, source = self._opened()
        before = feed.position(source.cursor)
        batch = source.take(until)
        if feed.position(source.cursor) == before:
            return False
        self._bring_to_disk(source.cursor)
        if not batch.empty:
            self._ledger.mark = sink.ship(batch)
        self._ledger.offsets = dict(source.cursor.offsets)
        self._ledger.concluded = False
        self._ledger.save(self._file)
        return True

    def _bring_to_disk(self, cursor: Cursor) -> None:
        """Fsync the journal before a batch is shipped.

        After a power cut, the journal files could otherwise be shorter than the ledger's offsets, and the
        next attempt would log the same steps again.
        """
        folder = self._directory.journal
        for name, offset in cursor.offsets.items():
            if offset > self._on_disk.get(name, 0):
                with contextlib.suppress(FileNotFoundError):  # another machine continued the run
                    self._on_disk[name] = (folder / name).stat().st_size
                    storage.sync_file(folder / name)
                    storage.sync_directory(folder)

    @property
    def concluded(self) -> bool:
        """Whether the sink was told how the run ended, and nothing was shipped after that."""
        return self._ledger.concluded

    def conclude(self) -> None:
        """Tell the sink how the run ended. Raises whatever the sink raises."""
        sink, source = self._opened()
        sink.conclude(source.ending())
        self._ledger.concluded = True
        self._ledger.save(self._file)

    def failed(self, error: Exception, report: bool) -> None:
        """Start over after an error; with `report`, also record it in the ledger, which is shown to users."""
        self.close()
        kind = "" if isinstance(error, StokerError) else f"{type(error).__name__}: "
        reason = store.without_credentials(f"{kind}{error}")
        log.warning("%s: %s", self._directory.id, reason)
        if report:
            self._ledger.failed(reason)
            with contextlib.suppress(OSError):  # a full disk may be the failure itself
                self._ledger.save(self._file)

    def close(self) -> None:
        """Close the sink."""
        if self._open is not None:
            sink, self._open = self._open[0], None
            with contextlib.suppress(Exception):  # it failed, or is about to be reopened
                sink.close()

    def _opened(self) -> tuple[Sink, Feed]:
        if self._open is None:
            sink = self._create(self._directory)
            try:
                self._open = sink, self._opened_feed(sink)
            except BaseException:
                with contextlib.suppress(Exception):
                    sink.close()
                raise
        return self._open

    def _opened_feed(self, sink: Sink) -> Feed:
        """Open the sink, and the journal at the position in the ledger."""
        known = self._ledger
        run = sink.open(known.run, feed.started(self._directory), known.mark, known.edition)
        if run.id != known.run or run.anew:  # ship the whole journal again
            self._ledger = known.begun(run.id)
        self._ledger.where = run.where
        self._ledger.recovered()
        self._ledger.save(self._file)
        return Feed(self._directory.journal, self._ledger.cursor, Cursor(dict(self._ledger.folded)))
