from __future__ import annotations

import pytest
from stoker.duration import Duration, clock, shown_clock


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        ("100", 100, "step"), (100, 100, "step"), ("2ep", 2, "epoch"), ("0.5ep", 0.5, "epoch"),
        ("1000000tok", 1e6, "token"), ("1_000_000tok", 1e6, "token"), ("1e6tok", 1e6, "token"),
        ("5000samples", 5000, "sample"), ("10min", 10, "minute"), ("2h", 2, "hour"), (" 3 ep ", 3, "epoch"),
    ],
)  # fmt: skip
def test_reads_counts_with_units(text: object, count: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(count, unit)


@pytest.mark.parametrize(
    "text", ["", "ep", "-5", "0", "0ep", "1.5", "2.5tok", "10 parsecs", "nan", True, None]
)
def test_refuses_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        Duration.parse(text)


@pytest.mark.parametrize("text", ["100", "2ep", "1000000tok", "5000samples", "10min", "0.5ep", "1e-05ep"])
def test_prints_as_it_is_read(text: str) -> None:
    assert Duration.parse(str(Duration.parse(text))) == Duration.parse(text)
    assert str(Duration.parse(text)) == text


def test_only_the_clock_has_seconds() -> None:
    assert Duration.parse("10min").seconds == 600
    assert Duration.parse("10").seconds is None


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("3h55m", 14100, "3h55min"), ("90min", 5400, "1h30min"), ("1d12h", 129600, "1d12h"),
        ("30s", 30, "30s"), ("4:00:00", 14400, "4h"),
        ("00:01:30", 90, "1min30s"), ("1-00:00:00", 86400, "1d"),
        ("2-12", 216000, "2d12h"), ("0-01:30", 5400, "1h30min"),
    ],
)  # fmt: skip
def test_reads_a_length_of_time_also_as_slurm_writes_it(text: str, seconds: float, shown: str) -> None:
    assert clock(text) == seconds
    assert shown_clock(seconds) == shown
    assert clock(shown) == seconds


@pytest.mark.parametrize("text", ["", "240", "4:00", "0:00:00", "4:00:00:00", "4:99:00", "1-", "4x"])
def test_refuses_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(ValueError, match="is not a length of time"):
        clock(text)
