"""What a job writes, read from several sources at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stoker.errors import StokerError
from stoker.launch import tail
from stoker.launch.targets import Line


def test_two_sources_are_read_at_once_until_both_have_ended(tmp_path: Path) -> None:
    file = tmp_path / "rank-0.log"

    def nodes() -> Iterator[Line]:
        yield Line("node 0", "begins")
        file.write_text("step 1\n")
        yield Line("node 0", "ends")

    ranks = tail.lines(lambda: {"rank 0": file}, file.exists)
    assert sorted(tail.together(nodes(), ranks)) == [
        ("node 0", "begins"),
        ("node 0", "ends"),
        ("rank 0", "step 1"),
    ]


def test_a_source_that_fails_is_heard_of() -> None:
    def fails() -> Iterator[Line]:
        yield Line("node 0", "begins")
        raise StokerError("the cluster does not answer")

    with pytest.raises(StokerError, match="does not answer"):
        list(tail.together(fails()))
