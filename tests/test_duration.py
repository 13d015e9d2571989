from __future__ import annotations

import pytest
from stoker.duration import Duration


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
