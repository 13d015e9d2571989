"""How often ranks that fail are started again."""

from __future__ import annotations

from stoker.errors import StokerError


class RankFailed(StokerError):
    """A rank ended with an exception, was killed, or hangs; the message has its traceback."""

    step = -1
    """How many steps were done."""
    saved = -1
    """The step of the newest checkpoint on disk then."""
    brief = ""
    """The message in a line, where that is not its first."""
    at = 0.0
    """When, in seconds since 1970 by this machine's clock; 0 for now."""
    raised = False
    """Whether it was an exception of the code, and not the end of a process or a standstill."""


class Budget:
    """How many restarts are left: as many as at first, whenever a checkpoint was taken since the last."""

    def __init__(self, restarts: int) -> None:
        self._whole = self.left = restarts
        self._before: RankFailed | None = None

    def spend(self, failure: RankFailed) -> None:
        """Take one for a failure. Raises it where none is left, or where the same happens again.

        What will be something else the next time (`StokerError.changed`) costs none.
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
