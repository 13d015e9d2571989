"""What runs beside the loop of an attempt: the journal reaches the disk, the machine is sampled, the run is
shipped to its sinks and uploaded to its object store.
"""

from __future__ import annotations

from collections.abc import Callable

from stoker.periodic import Periodic, Task
from stoker.run.directory import RunDirectory
from stoker.run.mirror import Mirror
from stoker.run.recorder import Recorder
from stoker.run.uploader import Uploads
from stoker.tracking.shipping import Shipping
from stoker.tracking.sinks import enabled, say_what_is_disabled
from stoker.tracking.system import SystemSampler

_SYNC_SECONDS = 1.0  # how much a power failure may lose; the death of the process loses nothing
_SYSTEM_SECONDS = 10.0
_LOOK_SECONDS = 2.0


class Background:
    """What runs beside the loop, from the first metric on.

    Args:
        run: the run.
        leads: whether this process writes the run; the others only have their journal synced.
        copy: the run's copy in an object store, if it has one.

    Raises BadInput for a sink that is unknown or not installed.
    """

    def __init__(self, run: RunDirectory, leads: bool, copy: Mirror | None) -> None:
        self._run, self._leads = run, leads
        sinks = enabled()
        self.shipping = Shipping(run, sinks if leads else ())
        self.uploads = Uploads(run, copy if leads else None)
        self._periodic: Periodic | None = None
        self._system: SystemSampler | None = None
        """Created after the first second: a shorter run has nothing to sample."""

    def begin(self, recorder: Recorder, step: Callable[[], int]) -> None:
        """There is something to ship and to look after.

        Args:
            recorder: writes this process's journal.
            step: the step that the machine's samples are recorded at.
        """
        jobs = [Task(_SYNC_SECONDS, lambda: self._sync(recorder))]
        if self._leads:
            say_what_is_disabled()
            self.shipping.begin()
            self.uploads.begin()
            jobs += [
                Task(_LOOK_SECONDS, self.shipping.look_after),
                Task(_SYSTEM_SECONDS, lambda: self.sample(recorder, step())),
                Task(_LOOK_SECONDS, self.uploads.look_after),
            ]
        self._periodic = Periodic(jobs)

    def leave_shipping(self) -> None:
        """Let another process ship this run, as the process of a search does for its trials."""
        self.shipping = Shipping(self._run, ())

    def sample(self, recorder: Recorder, step: int) -> None:
        """Record how busy the machine is, if this has been going on for a while."""
        if self._system is not None:
            recorder.system(step, self._system.sample())

    def close(self) -> None:
        """End the small jobs. What ships and uploads ends by itself, once it has done all."""
        if self._periodic is not None:
            self._periodic.close()

    def _sync(self, recorder: Recorder) -> None:
        recorder.write_arrived(wait=False)
        recorder.sync()
        if self._system is None and self._leads:
            self._system = SystemSampler(self._run.path)
