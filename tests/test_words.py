"""Numbers in words."""

from __future__ import annotations

import pytest
from stoker import words


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (12_000, "12,000 files")]
)
def test_one_thing_is_no_several(number: int, said: str) -> None:
    assert words.counted(number, "file") == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"), (1023, "1,023 B"), (1024, "1.0 KiB"), (2**20, "1.0 MiB"), (1.5 * 2**30, "1.5 GiB"),
        (2**41, "2.0 TiB"),
    ],
)  # fmt: skip
def test_bytes_are_said_in_the_largest_unit_that_they_fill(count: float, said: str) -> None:
    assert words.size(count) == said


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    assert words.first_line(ValueError("one\ntwo")) == "one"
    assert words.first_line(ValueError("\n")) == "ValueError"
