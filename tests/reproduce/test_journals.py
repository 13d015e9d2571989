"""Comparing the metrics of two runs."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stoker.reproduce import journals

from support import series

POINTS = st.dictionaries(st.integers(1, 50), st.floats(width=64), min_size=1, max_size=30)


def _bits(value: float) -> bytes:
    return struct.pack("<d", value) if not math.isnan(value) else b"nan"


@given(POINTS, POINTS)
def test_the_first_step_that_differs_is_the_one_that_a_loop_over_the_bits_finds(
    before: dict[int, float], now: dict[int, float]
) -> None:
    before, now = dict(sorted(before.items())), dict(sorted(now.items()))
    nothing = object()
    differ = [
        step
        for step in sorted({*before, *now})
        if (_bits(before[step]) if step in before else nothing)
        != (_bits(now[step]) if step in now else nothing)
    ]
    found = journals.compare(series(loss=before), series(loss=now))
    assert found.identical == (not differ)
    assert [drift.first_step for drift in found.drifts] == differ[:1]
    assert found.steps == len({*before, *now})


def test_nan_equals_nan_and_zero_is_not_minus_zero() -> None:
    assert journals.compare(series(loss={1: math.nan}), series(loss={1: math.nan})).identical
    (drift,) = journals.compare(series(loss={1: 0.0}), series(loss={1: -0.0})).drifts
    assert (drift.first_step, drift.absolute) == (1, 0.0)


def test_drift_is_the_largest_difference_and_where_it_is() -> None:
    before = series(loss={1: 1.0, 2: 4.0, 3: 2.0, 4: 8.0})
    now = series(loss={1: 1.0, 2: 5.0, 3: 4.0, 4: 10.0})
    (drift,) = journals.compare(before, now).drifts
    assert (drift.first_step, drift.before, drift.now) == (2, 4.0, 5.0)
    assert (drift.points, drift.differing) == (4, 3)
    assert (drift.absolute, drift.absolute_step) == (2.0, 3)
    assert (drift.relative, drift.relative_step) == (0.5, 3)


def test_a_value_that_is_no_number_any_more_is_infinitely_far() -> None:
    (drift,) = journals.compare(series(loss={1: 1.0}), series(loss={1: math.nan})).drifts
    assert (drift.absolute, drift.relative) == (math.inf, math.inf)


def test_points_of_one_run_alone_are_a_difference() -> None:
    (drift,) = journals.compare(series(loss={1: 1.0, 2: 2.0}), series(loss={1: 1.0, 3: 3.0})).drifts
    assert (drift.first_step, drift.before, drift.now) == (2, 2.0, None)
    assert (drift.lacking, drift.added, drift.differing) == (1, 1, 0)


def test_only_the_stretch_that_is_asked_for_counts() -> None:
    before, now = series(loss={1: 0.0, 2: 2.0, 3: 3.0}), series(loss={1: 1.0, 2: 2.0, 3: 9.0})
    found = journals.compare(before, now, after=1, until=2)
    assert found.identical
    assert (found.steps, found.first, found.last) == (1, 2, 2)


def test_at_the_step_where_a_run_was_stopped_a_metric_of_one_run_alone_is_left_out_by_name() -> None:
    loss = {1: 1.0, 2: 2.0}
    before, now = series(loss=loss, val_loss={1: 5.0, 2: 3.0}), series(loss=loss, val_loss={1: 5.0})
    for one, other in ((before, now), (now, before)):
        found = journals.compare(one, other, until=2, cut=2)
        assert (found.identical, found.of_one_end) == (True, ("val_loss",))
        assert not journals.compare(one, other, until=2).identical
    assert not journals.compare(before, series(loss={1: 1.0}), until=2, cut=2).identical, "it was not reached"
    assert not journals.compare(before, series(loss={2: 2.0}, val_loss={2: 4.0}), cut=2).identical


def test_nothing_to_compare_is_not_identical() -> None:
    assert not journals.compare({}, {}).identical
    assert not journals.compare(series(loss={1: 1.0}), series(loss={1: 1.0}), after=5).identical


@pytest.mark.parametrize(
    "name", ["tokens_per_second", "seconds_evaluating", "mfu", "time/step_seconds", "throughput"]
)
def test_what_measures_the_machine_is_left_out_and_named(name: str) -> None:
    before, now = series(**{name: {1: 1.0}, "loss": {1: 1.0}}), series(**{name: {1: 2.0}, "loss": {1: 1.0}})
    found = journals.compare(before, now)
    assert found.identical
    assert found.left_out == (name,)


@pytest.mark.parametrize("name", ["loss", "val_loss", "memory_loss", "survival_time", "secondary_loss"])
def test_what_is_computed_is_compared(name: str) -> None:
    assert journals.compare(series(**{name: {1: 1.0}}), series(**{name: {1: 2.0}})).drifts
