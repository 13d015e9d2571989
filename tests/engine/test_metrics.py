"""Metrics over ranks are those of one process, whatever the shares are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import strategies_run
import torch
from stoker.engine.metrics import Max, Mean, Perplexity, Sum, Totals, _joined
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import ranks
from support import SOAK


def test_totals_weigh_batches_and_leave_out_what_does_not_count() -> None:
    totals = Totals()
    totals.add({"a": Mean(torch.tensor(6.0), 3), "s": Sum(2), "m": Max(-5.0), "p": Perplexity(4.0, 2)})
    totals.add({"a": Mean(2.0, 1), "s": Sum(1), "m": Max(torch.tensor(-7.0)), "p": Perplexity(0.0, 2)})
    totals.add({"a": Mean(100.0, 1), "s": Sum(100), "m": Max(100), "p": Perplexity(100, 1)}, counts=False)
    assert totals.over_ranks() == {"a": 2.0, "s": 3.0, "m": -5.0, "p": math.e}


def test_while_they_are_summed_up_no_value_is_asked_for() -> None:
    """On a GPU each would wait for all that is computed: tensors without values cannot be asked."""
    totals = Totals()
    with FakeTensorMode():
        for _ in range(2):
            loss = torch.ones((), dtype=torch.bfloat16)
            totals.add({"a": Mean(loss, torch.ones((), dtype=torch.int64)), "m": Max(loss), "s": Sum(loss)})
        with pytest.raises(DataDependentOutputException):
            totals.over_ranks()


def test_a_mean_of_nothing_is_not_a_number_and_a_large_perplexity_is_infinite() -> None:
    totals = Totals()
    totals.add({"a": Mean(0.0, 0.0), "p": Perplexity(1e6, 1)})
    found = totals.over_ranks()
    assert math.isnan(found["a"])
    assert found["p"] == math.inf


@pytest.mark.parametrize("values", [[math.nan], [1.0, math.nan], [math.nan, 1.0]])
def test_the_largest_of_values_of_which_one_is_not_a_number_is_none(values: list[float]) -> None:
    totals = Totals()
    for value in values:
        totals.add({"m": Max(value)})
    assert math.isnan(totals.over_ranks()["m"])
    assert math.isnan(_joined([("Max", value, 0.0) for value in values]))


def test_sums_of_ranks_that_are_infinite_are_not_a_number() -> None:
    assert math.isnan(_joined([("Mean", math.inf, 1.0), ("Mean", -math.inf, 1.0)]))


SAMPLES = [1, 7, 13, 16] if SOAK else [1, 13]
"""In batches of 4 over two ranks: some without a sample, some with fewer."""


def _measured(parallel: str, size: int, folder: Path) -> list[dict[int, dict[str, float]]]:
    settings = {"parallel": parallel}
    return ranks.run(strategies_run.measure, size, folder, folder, parallel, settings, SAMPLES)


@pytest.mark.soak
def test_metrics_over_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    (alone,) = _measured("single", 1, tmp_path)
    for samples, metrics in alone.items():
        assert metrics["rows"] == samples
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    for parallel in ("ddp", "fsdp", "pipeline"):
        for found in _measured(parallel, 2, tmp_path):
            for samples, metrics in alone.items():
                assert found[samples] == pytest.approx(metrics, rel=1e-6), (parallel, samples)
