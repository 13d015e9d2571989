"""`stoker bench scaling`: real ranks, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stoker.report import scaling

from conftest import Command

RECIPE = str(Path(__file__).parent / "ranked.py")


def test_a_recipe_is_measured_by_the_number_of_ranks(stoker: Command, tmp_path: Path) -> None:
    done = stoker(
        "bench", "scaling", RECIPE, "precision=fp32", "--nproc", "2,1", "--steps", "10", "--repeats", "2",
        "-o", "out/how.html", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = done.answer["rows"]
    assert [(r["scaling"], r["ranks"], r["batch_size"]) for r in rows] == [
        ("strong", 1, 16), ("strong", 2, 16), ("weak", 2, 32),
    ]  # fmt: skip
    for row in rows:
        low, high = row["rate_spread"]
        assert 0 < low <= row["rate"] <= high
        assert row["peak_bytes"] > 2**20
        assert 0 <= row["waiting"] <= 1
        assert (row["communication"] > 0) == (row["ranks"] > 1)
    assert rows[0]["efficiency"] == 1.0
    assert json.loads((tmp_path / "out" / "how.json").read_text()) == rows
    assert "How ranked scales" in (tmp_path / "out" / "how.html").read_text()
    assert not (tmp_path / "runs").exists(), "no run is left behind"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc", "1,x"], "give numbers of ranks joined by commas"),
        (["batch_size=15"], "nearest that can is 14 or 16"),
        (["--steps", "500"], "ended before 500 steps were measured"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], said: str, stoker: Command) -> None:
    done = stoker("bench", "scaling", RECIPE, *arguments, "--repeats", "1")
    assert (done.code, said in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"waiting": 0.4, "communication": 0.2}, "waiting for data"),
        ({"waiting": 0.0, "communication": 0.2}, "communication"),
        ({"waiting": 0.0, "communication": 0.0}, "share of the batch"),
        ({"waiting": 0.0, "communication": 0.0, "scaling": "weak"}, "memory bandwidth"),
        ({"waiting": 0.9, "communication": 0.9, "efficiency": 0.9}, ""),
        ({"waiting": 0.9, "communication": 0.9, "ranks": 1}, ""),
    ],
)
def test_poor_efficiency_has_its_cause_named(row: dict[str, Any], said: str) -> None:
    found = scaling.cause({"ranks": 4, "efficiency": 0.5, "scaling": "strong", **row})
    assert said in found
    assert bool(found) == bool(said)
