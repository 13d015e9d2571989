"""The recorder: writes what one attempt logs to the journal, in the order in which it was logged.

Plain numbers are written at once: most calls log nothing else, and must cost next to nothing. Values that are
still on an accelerator are written once they have arrived, and everything logged after them waits for that.
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

_STEPS = 2**63  # a step has 64 bits, with the sign


class Recorder:
    """Metrics and events of this process in one attempt.

    Args:
        writer: writes this process's journal file.
        world: gives the rank; only rank 0 records events and metrics that are not reduced over ranks.
        begin: called once, with the first metric or by `begin`.
    """

    def __init__(self, writer: journal.JournalWriter, world: World, begin: Callable[[], None]) -> None:
        self._writer, self._world, self._begin = writer, world, begin
        self.latest: dict[str, float] = {}
        """The value of each metric at its newest step; if it is reduced over ranks, after the last `agree`.

        As in the journal, the first value of a step stands.
        """
        self.latest_at: dict[str, int] = {}
        """The step of each of them."""
        self._unreduced: dict[str, tuple[int, float, How]] = {}
        self.used = False
        """Whether there is something to keep: a metric was logged, or `begin` was called."""
        self._pending: collections.deque[tuple[Deferred | DeferredArrays, int, float, How | None]]
        self._pending = collections.deque()
        self._carried: tuple[Mapping[str, Any], Mapping[str, tuple[Any, ...]]] | None = None
        self._names: set[str] = set()
        self._highest, self._went_back = 0, False
        self._newest = 0
        """The highest step in `latest_at`."""
        self._lock = threading.Lock()

    @property
    def file(self) -> Path:
        """The journal file of this process."""
        return self._writer.file

    def log(self, values: Mapping[str, Any], step: int, reduce: How | None = None) -> None:
        """Write metrics for a step; see `Run.log`."""
        if reduce is None and self._is_plain(values, step):
            self._highest = step
            self._writer.append_values(step, values)
            self._is_latest(values, step)
        else:
            self._log_any(values, step, reduce)

    def begin(self) -> None:
        """Have what is recorded kept, as from the first metric on it is."""
        if not self.used:
            self.used = True
            self._begin()

    def event(self, kind: str, /, **fields: Any) -> None:
        """Write an event after everything logged before it, waiting for the device if necessary."""
        if self._world.rank > 0:
            return
        self.write_arrived(wait=True)
        with self._lock:
            self._writer.append(kind, **fields)

    def system(self, step: int, values: Mapping[str, float]) -> None:
        """Write system metrics at once."""
        with self._lock:
            self._writer.append("system", step=step, values=journal.encode_values(values))

    def carry(self, norms: Mapping[str, Any], histograms: Mapping[str, tuple[Any, ...]]) -> None:
        """Keep a watch's values until the next `log`, which gives their step; newer values replace older."""
        if self._world.rank == 0:
            before, shown_before = self._carried or ({}, {})
            self._carried = {**before, **norms}, {**shown_before, **histograms}

    def go_on_from(self, step: int, latest: Mapping[str, tuple[int, float]]) -> None:
        """Continue from the step that the attempt resumed from, with each metric's newest point by then."""
        self.write_arrived(wait=True)
        self._highest = step
        self._newest = step
        self._unreduced.clear()
        self.latest_at = {name: at for name, (at, _) in latest.items()}
        self.latest = {name: value for name, (_, value) in latest.items()}

    @property
    def unreduced(self) -> dict[str, tuple[int, float, How]]:
        """For each metric that is reduced over ranks: the step, this rank's newest value, and how to reduce.

        Waits for values that are still being copied from the device. See `agree`.
        """
        self.write_arrived(wait=True)
        return self._unreduced

    def agree(self, of_ranks: Sequence[Mapping[str, tuple[int, float, How]]]) -> None:
        """Reduce the `unreduced` values of all ranks, for metrics that all logged at the same step."""
        for name, (step, _, how) in of_ranks[0].items():
            found = [own[name] for own in of_ranks if name in own]
            if len(found) == len(of_ranks) and {at for at, *_ in found} == {step}:
                self._is_latest({name: reduced(how, [value for _, value, _ in found])}, step)
        self._unreduced.clear()

    def write_arrived(self, wait: bool) -> None:
        """Write the pending points in order, up to the first that has not arrived."""
        with self._lock:
            while self._pending and (wait or self._pending[0][0].arrived):
                self._write(*self._pending[0])
                self._pending.popleft()  # only now: the write may fail, for example on a full disk

    def sync(self) -> None:
        """Flush the journal file to disk. Raises OSError if this or an earlier flush failed."""
        self._writer.sync()

    def close(self) -> None:
        """Close the journal file; later calls to log are refused."""
        self._writer.close()

    def _is_plain(self, values: Mapping[str, Any], step: int) -> bool:
        """Whether they can be written as they are: rank 0's, known names, finite floats, none pending."""
        if self._world.rank > 0 or type(step) is not int or type(values) is not dict:
            return False
        if not self._highest <= step < _STEPS:
            return False
        if self._pending or self._carried or not (self.used and values.keys() <= self._names):
            return False
        for value in values.values():  # noqa: SIM110 - all() with a generator takes twice as long
            if type(value) is not float or value - value != 0.0:  # true of NaN and infinities
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
        if not -_STEPS <= step < _STEPS:
            raise ValueError(f"step={step}: a step has at most 64 bits; give the number of the training step")
        if self._world.rank > 0 and reduce is None:
            return
        self.begin()
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
            for name, value in values.items():
                if name not in self._unreduced or step > self._unreduced[name][0]:
                    self._unreduced[name] = (step, value, reduce)

    def _is_latest(self, values: Mapping[str, float], step: int) -> None:
        if step > self._newest:  # than of any metric: the usual case, made fast
            self._newest = step
            self.latest.update(values)
            for name in values:
                self.latest_at[name] = step
            return
        for name, value in values.items():
            if name not in self.latest_at or step > self.latest_at[name]:
                self.latest[name], self.latest_at[name] = value, step

    def _write_histograms(self, arrays: Mapping[str, Any], step: int, at: float) -> None:
        for name in (key.removesuffix("/counts") for key in arrays if key.endswith("/counts")):
            low, high = float(arrays[f"{name}/low"]), float(arrays[f"{name}/high"])
            if low > high:  # no value is finite
                low, high = 0.0, 1.0
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
