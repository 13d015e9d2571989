"""`stoker bench scaling`: real ranks, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stoker.cli.verbs import bench
from stoker.report import scaling

from commands import Command

RECIPE = str(Path(__file__).parent / "ranked.py")


def test_a_recipe_is_measured_by_the_number_of_ranks(stoker: Command, tmp_path: Path) -> None:
    done = stoker(
        "bench", "scaling", RECIPE, "precision=fp32", "--nproc", "2,1", "--steps", "10", "--repeats", "2",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = done.answer["rows"]
    assert [(r["scaling"], r["ranks"], r["batch_size"]) for r in rows] == [
        ("strong", 1, 16), ("strong", 2, 16), ("weak", 2, 32),
    ]  # fmt: skip
    for row in rows:
        assert len(row["rates"]) == 2
        assert 0 < min(row["rates"]) <= row["rate"] <= max(row["rates"])
        assert len(row["peak_bytes"]) == row["ranks"]
        assert min(row["peak_bytes"]) > 2**20
        assert (row["parallel"], row["precision"]) == ("single" if row["ranks"] == 1 else "ddp", "fp32")
        assert 0 <= row["waiting"] <= 1
        assert (row["communication"] > 0) == (row["ranks"] > 1)
    assert rows[0]["efficiency"] == 1.0
    beside_runs = tmp_path / "runs" / "ranked"
    written = json.loads((beside_runs / "scaling.json").read_text())
    assert written["rows"] == rows
    assert (written["steps"], written["repeats"], written["config"]["batch_size"]) == (10, 2, 16)
    assert written["machine"]["processor"]
    page = (beside_runs / "scaling.html").read_text()
    assert "How ranked scales" in page
    assert written["machine"]["processor"] in page
    assert "measuring weak scaling, 2 ranks, batch of 32, 2 of 2" in done.err
    assert "profiler" not in done.err
    assert not list(beside_runs.glob("*/")), "no run is left behind"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc", "1,x"], "give numbers of ranks separated by commas"),
        (["batch_size=15"], "nearest size that can is 14 or 16"),
        (["--steps", "500"], "ended before step 508, which timing 500 steps needs"),
        (["-o", "rows.json"], "name the page, such as rows.html"),
        (["-o", "/proc/nothing/x.html"], "cannot be written"),
        (["batch_size=3", "--nproc", "2,3"], "make it a multiple of 2"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], said: str, stoker: Command) -> None:
    done = stoker("bench", "scaling", RECIPE, *arguments, "--repeats", "1")
    assert (done.code, said in done.err) == (2, True), done.err


def test_a_run_that_is_too_short_is_refused_before_it_is_measured(stoker: Command) -> None:
    done = stoker("bench", "scaling", "llm", "max_steps=10", "--steps", "3")
    assert done.code == 2
    assert "max_steps=10 is too short: timing 3 steps takes 11" in done.err
    assert "measuring" not in done.err


def test_efficiency_is_the_rate_a_rank_over_that_of_the_fewest() -> None:
    def measured(*rates: float) -> list[dict[str, Any]]:
        rest = {"unit": "samples", "seconds": 1.0, "waiting": 0.0, "communication": 0.0}
        return [{"rate": r, "peak_bytes": [1], "parallel": "ddp", "precision": "fp32", **rest} for r in rates]

    rows = bench.summarised({
        ("strong", 2, 8): measured(90, 100, 130),
        ("strong", 4, 8): measured(120),
        ("weak", 4, 16): measured(200),
    })  # fmt: skip
    assert [row["efficiency"] for row in rows] == [1.0, 0.6, 1.0]


def test_a_table_of_it_fits_a_terminal() -> None:
    row = {
        "scaling": "strong", "ranks": 16, "batch_size": 4096, "unit": "samples", "rate": 1_015_024.0,
        "rates": [1_000_000.0, 1_100_000.0], "efficiency": 0.97, "peak_bytes": [140 * 2**30], "waiting": 0.12,
        "communication": 0.34,
    }  # fmt: skip
    widths = map(
        max, zip(*(map(len, line) for line in (scaling.headings([row]), scaling.cells(row))), strict=True)
    )
    assert sum(widths) + 8 <= 80


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
