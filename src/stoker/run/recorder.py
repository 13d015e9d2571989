"""The recorder: what one attempt logs, on its way into the journal, in the order in which it was logged.

A number is written at once: most calls log nothing else, and must cost next to nothing. What is still on an
accelerator is written once it has arrived, and whatever was logged after it waits behind it.
"""

from __future__ import annotations

import collections
import logging
import operator
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker.run import journal
from stoker.run.deferred import Deferred, DeferredArrays, check_name, flatten
from stoker.run.reduction import WAYS, How, reduced
from stoker.world import World

log = logging.getLogger("stoker")


class Recorder:
    """Metrics and events of this process in one attempt.

    Args:
        writer: the process's own file of the journal.
        world: its rank; events, and metrics that are not reduced over ranks, are kept of rank 0 alone.
        begin: called once, with the first metric.
    """

    def __init__(self, writer: journal.JournalWriter, world: World, begin: Callable[[], None]) -> None:
        self._writer, self._world, self._begin = writer, world, begin
        self.latest: dict[str, float] = {}
        """The newest value of every metric; of one that is reduced over ranks, once they have agreed."""
        self._unreduced: dict[str, tuple[int, float, How]] = {}
        self.followed: str | None = None
        """A metric of which the step of its newest value is kept as well."""
        self.followed_at: int | None = None
        self.used = False
        """Whether a metric was logged."""
        self._pending: collections.deque[tuple[Deferred | DeferredArrays, int, float, How | None]]
        self._pending = collections.deque()
        self._carried: tuple[Mapping[str, Any], Mapping[str, tuple[Any, ...]]] | None = None
        self._names: set[str] = set()
        self._highest, self._went_back = 0, False
        self._lock = threading.Lock()

    @property
    def file(self) -> Path:
        """Where it is written."""
        return self._writer.file

    def log(self, values: Mapping[str, Any], step: int, reduce: How | None = None) -> None:
        """Write metrics at a step; see `Run.log`."""
        if reduce is None and self._is_plain(values, step):
            self._highest = step
            self._writer.append_values(step, values)
            self._is_latest(values, step)
        else:
            self._log_any(values, step, reduce)

    def event(self, kind: str, /, **fields: Any) -> None:
        """Write an event behind all that was logged before it, waiting for the device where it must."""
        if self._world.rank > 0:
            return
        self.write_arrived(wait=True)
        with self._lock:
            self._writer.append(kind, **fields)

    def system(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was seen of the machine, at once."""
        with self._lock:
            self._writer.append("system", step=step, values=journal.encode_values(values))

    def carry(self, norms: Mapping[str, Any], histograms: Mapping[str, tuple[Any, ...]]) -> None:
        """Keep what a watch saw for the next `log`, whose step it belongs to; of a name the newest."""
        if self._world.rank == 0:
            before, shown_before = self._carried or ({}, {})
            self._carried = {**before, **norms}, {**shown_before, **histograms}

    def go_on_from(self, step: int, latest: Mapping[str, float]) -> None:
        """The attempt resumed from a step, at which these were the newest values."""
        self._highest = step
        self.latest = dict(latest)

    @property
    def unreduced(self) -> dict[str, tuple[int, float, How]]:
        """For each metric that is reduced over ranks: the step, this rank's newest value, and how to reduce.

        Waits for values that are still on their way from the device. See `agree`.
        """
        self.write_arrived(wait=True)
        return self._unreduced

    def agree(self, of_ranks: Sequence[Mapping[str, tuple[int, float, How]]]) -> None:
        """Take what each rank has `unreduced`: what all have of the same step is their newest value."""
        for name, (step, _, how) in of_ranks[0].items():
            found = [own[name] for own in of_ranks if name in own]
            if len(found) == len(of_ranks) and {at for at, *_ in found} == {step}:
                self._is_latest({name: reduced(how, [value for _, value, _ in found])}, step)
        self._unreduced.clear()

    def write_arrived(self, wait: bool) -> None:
        """Write the pending points in order, up to the first that is still on its way."""
        with self._lock:
            while self._pending and (wait or self._pending[0][0].arrived):
                self._write(*self._pending[0])
                self._pending.popleft()  # not before: the disk may be full just now

    def sync(self) -> None:
        """Bring to the disk what was written. Raises OSError where some of it did not come there, ever."""
        self._writer.sync()

    def close(self) -> None:
        """What is logged from now on is refused."""
        self._writer.close()

    def _is_plain(self, values: Mapping[str, Any], step: int) -> bool:
        """Whether there is nothing to do but to write: known names, finite floats, nothing on its way."""
        if type(step) is not int or step < self._highest or type(values) is not dict:
            return False
        if self._pending or self._carried or not (self.used and values.keys() <= self._names):
            return False
        for value in values.values():  # noqa: SIM110 - all() with a generator takes twice as long
            if type(value) is not float or value - value != 0.0:  # which NaN and infinities are not
                return False
        return True

    def _log_any(self, values: Mapping[str, Any], step: int, reduce: How | None) -> None:
        flat = flatten(values)
        if not flat.keys() <= self._names:
            self._check_names(flat)
        deferred = Deferred(flat)
        if reduce is not None and reduce not in WAYS:
            raise ValueError(f"reduce={reduce!r}: must be one of {', '.join(WAYS)}")
        if isinstance(step, bool) or not hasattr(step, "__index__"):
            raise TypeError(f"step={step!r}: must be a whole number")
        step = operator.index(step)
        if self._world.rank > 0 and reduce is None:
            return
        if not self.used:
            self.used = True
            self._begin()
        if step < self._highest:
            self._warn_of_going_back(flat, step)
        else:
            self._highest = step
        self._pending.append((deferred, step, time.time(), reduce if self._world.size > 1 else None))
        if self._carried:
            self._log_carried(*self._carried, step)
        self.write_arrived(wait=False)

    def _log_carried(
        self, norms: Mapping[str, Any], histograms: Mapping[str, tuple[Any, ...]], step: int
    ) -> None:
        self._carried = None
        at = time.time()
        self._pending.append((Deferred(norms), step, at, None))
        if histograms:
            parts = ("low", "high", "counts")
            tensors = {
                f"{n}/{part}": t for n, h in histograms.items() for part, t in zip(parts, h, strict=True)
            }
            self._pending.append((DeferredArrays(tensors), step, at, None))

    def _write(self, deferred: Deferred | DeferredArrays, step: int, at: float, reduce: How | None) -> None:
        if isinstance(deferred, DeferredArrays):
            self._write_histograms(deferred.read(), step, at)
            return
        values = deferred.read()
        fields = {"reduce": reduce} if reduce is not None else {}
        self._writer.append("metrics", time=at, step=step, values=journal.encode_values(values), **fields)
        if reduce is None:
            self._is_latest(values, step)
        else:
            self._unreduced.update({name: (step, value, reduce) for name, value in values.items()})

    def _is_latest(self, values: Mapping[str, float], step: int) -> None:
        self.latest.update(values)
        if self.followed in values:
            self.followed_at = step

    def _write_histograms(self, arrays: Mapping[str, Any], step: int, at: float) -> None:
        for name in (key.removesuffix("/counts") for key in arrays if key.endswith("/counts")):
            low, high = float(arrays[f"{name}/low"]), float(arrays[f"{name}/high"])
            counts = arrays[f"{name}/counts"].tolist()
            edges = [low + (high - low) * i / len(counts) for i in range(len(counts) + 1)]
            about = {"edges": edges, "counts": counts}
            self._writer.append("media", time=at, kind="histogram", name=name, step=step, about=about)

    def _check_names(self, values: Mapping[str, Any]) -> None:
        if "step" in values:
            raise ValueError("'step' cannot be a metric name: pass the step as run.log(..., step=)")
        for name in values:
            check_name(name)
        self._names.update(values)

    def _warn_of_going_back(self, values: Mapping[str, Any], step: int) -> None:
        if not self._went_back:
            self._went_back = True
            log.warning(
                "%s: logged at step %d after step %d; kept at that step, unless it already has a point",
                ", ".join(list(values)[:3]), step, self._highest,
            )  # fmt: skip
