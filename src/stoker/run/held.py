"""What a resumed run logs in a part of its script that it has been through: it may have logged it before."""

from __future__ import annotations

from collections.abc import Callable


class Held:
    """Holds back what is logged, from `begin` until it is known whether it was logged before."""

    def __init__(self) -> None:
        self._writes: list[Callable[[], None]] | None = None

    @property
    def active(self) -> bool:
        """Whether what is logged now is held back."""
        return self._writes is not None

    def begin(self) -> None:
        """Hold back what is logged from now on."""
        if self._writes is None:
            self._writes = []

    def drop(self) -> None:
        """Leave out what is held back: it was logged before. What follows is logged at once."""
        self._writes = None

    def release(self) -> None:
        """Log what is held back: it was not logged before. What follows is logged at once."""
        writes, self._writes = self._writes or [], None
        for write in writes:
            write()

    def do(self, write: Callable[[], None]) -> None:
        """Call a function that logs something: now, or when what is held back is released."""
        if self._writes is None:
            write()
        else:
            self._writes.append(write)
