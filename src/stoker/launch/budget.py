"""How often failing ranks are started again."""

from __future__ import annotations

from stoker.errors import StokerError


class RankFailed(StokerError):
    """A rank ended with an exception, was killed, or hangs; the message contains its traceback."""

    step = -1
    """The number of steps done."""
    saved = -1
    """The step of the newest checkpoint on disk at that time."""
    brief = ""
    """The message in one line, if that is not its first line."""
    at = 0.0
    """The time, in seconds since 1970 by this machine's clock; 0 for now."""
    raised = False
    """Whether it was an exception from the code, rather than the end of a process or a hang."""


class Budget:
    """The number of restarts left: reset to the original number by every new checkpoint."""

    def __init__(self, restarts: int) -> None:
        self._whole = self.left = restarts
        self._before: RankFailed | None = None

    def spend(self, failure: RankFailed) -> None:
        """Spend a restart on a failure. Raises it if none is left, or if the same failure repeats.

        A failure that will differ the next time (`StokerError.changed`) costs none.
        """
        before, self._before = self._before, failure
        if failure.changed and str(failure) != str(before):
            return
        if before is not None and failure.saved > before.saved:
            self.left = self._whole
        if before is not None and before.raised and failure.raised and before.step == failure.step:
            where = f"at step {failure.step + 1}" if failure.step >= 0 else "before its first step"
            raise RankFailed(
                f"it fails {where} every time, so it is not started again.\n"
                f"The first time: {before}\nThe second time: {failure}"
            )
        if self.left == 0:
            raise failure
        self.left -= 1
