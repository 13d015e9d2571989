"""The benchmark that needs a GPU goes every way it has, small and on a CPU: nothing is measured here."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # of transformers' Trainer
def test_fine_tuning_7b_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    bench = load("gpu_llm")
    rows = bench.table(bench.here, "adafactor", 1, True)
    assert [row.measure.partition(",")[0] for row in rows].count("LoRA") == 8
    assert all(math.isfinite(row.ours) for row in rows)
    losses = [row for row in rows if row.unit == "nats"]
    assert len(losses) == 4
    for row in losses:  # the peer's, within what bf16 can tell apart
        assert row.ratio < 0.001
