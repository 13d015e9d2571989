"""What the tests of data share: none leaves a thread behind that would read by the next one's environment."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from support import LONG


@pytest.fixture(autouse=True)
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that tokenise ahead have ended, before what they look at is as it was again."""
    yield
    for thread in threading.enumerate():
        if thread.name == "tokenise-ahead":
            thread.join(LONG)
            assert not thread.is_alive()
