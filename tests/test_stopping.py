"""How signals are answered: kept for a step boundary within a loop, at once outside of one."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from stoker.errors import Stopped
from stoker.stopping import StopRequests


def _steps(requests: StopRequests) -> Iterator[int]:
    with requests.deferred():
        yield from range(3)


def test_within_a_loop_a_signal_is_kept_for_the_step_boundary() -> None:
    requests = StopRequests()
    for step in _steps(requests):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        assert requests.requested == (None if step == 0 else "preempted")


def test_after_a_loop_that_was_left_by_break_it_is_answered_at_once() -> None:
    requests = StopRequests()
    with requests.handled():
        for _ in _steps(requests):
            break
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
