from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from stoker import Run
from stoker.checkpoint import manifest
from stoker.report import facts
from stoker.run import view
from stoker.run.directory import RunDirectory
from stoker.run.state import AttemptView, RunView

from support import series


def _view(path: Path = Path("runs/llm/a"), record: dict[str, Any] | None = None, **fields: Any) -> RunView:
    return RunView(RunDirectory(path), {"config": {}, "sources": {}, **(record or {})}, **fields)


def test_best_is_the_lowest_finite_value_and_the_first_step_that_had_it() -> None:
    metric = facts.metrics(_view(points=series(val_loss={1: math.nan, 2: 0.5, 3: 0.5, 4: -math.inf})))[
        "val_loss"
    ]
    assert (metric.best, metric.best_step, metric.last_step, metric.non_finite) == (0.5, 2, 4, 2)


def test_a_metric_that_is_not_a_loss_has_no_best() -> None:
    metric = facts.metrics(_view(points=series(tokens_per_second={1: 3.0})))["tokens_per_second"]
    assert metric.best is None


def test_config_starts_with_what_was_set_and_names_the_attempt_that_changed_it() -> None:
    record = {"config": {"a": 1, "b": 2, "c": 3}, "sources": {"a": "default", "b": "my.yaml", "c": "default"}}
    changed = {"c": [3, 4]}
    attempts = [AttemptView(1, 0.0), AttemptView(2, 1.0, drift=changed), AttemptView(3, 2.0, drift=changed)]
    found = [(v.key, v.value, v.source) for v in facts.config(_view(record=record, attempts=attempts))]
    assert found == [("b", 2, "my.yaml"), ("c", 4, "changed at attempt 2"), ("a", 1, "default")]


@dataclass(frozen=True, kw_only=True)
class _Model:
    depth: int = 2
    width: int = 8


@dataclass(frozen=True, kw_only=True)
class _Config:
    steps: int
    lr: float = 0.1
    key: str = field(default_factory=lambda: secrets.token_hex(4))
    model: _Model = _Model()


def test_of_a_script_s_config_what_the_script_gave_is_told_from_defaults(tmp_path: Path) -> None:
    config = _Config(steps=3, key="", model=_Model(width=16))
    with Run("test", "classes", runs=tmp_path, config=config) as run:
        found = {value.key: value.source for value in facts.config(view.load(run.directory))}
    assert found == {
        "steps": "script", "lr": "default", "key": "script", "model.depth": "default", "model.width": "script"
    }  # fmt: skip
    with Run("test", "parsed", runs=tmp_path, config={"lr": 0.1}) as run:
        (value,) = facts.config(view.load(run.directory))
    assert (value.source, value.is_default) == ("script", False)


def test_a_value_that_was_set_back_is_the_recorded_one_again() -> None:
    record = {"config": {"a": 1}, "sources": {"a": "default"}}
    attempts = [AttemptView(1, 0.0, drift={"a": [1, 2]}), AttemptView(2, 1.0)]
    (value,) = facts.config(_view(record=record, attempts=attempts))
    assert (value.value, value.source, value.is_default) == (1, "default", True)


def test_what_a_run_has_found_out_about_a_key_is_its_value() -> None:
    record = {"config": {"rank": 0, "b": 2}, "sources": {"rank": "default", "b": "default"}}
    found = [
        (v.key, v.value, v.source) for v in facts.config(_view(record=record, params={"rank": 8, "c": 1}))
    ]
    assert found == [("rank", 8, "determined by the run"), ("b", 2, "default")]


def test_only_checkpoints_with_a_manifest_count_as_kept(tmp_path: Path) -> None:
    view = _view(tmp_path, checkpoints=[1, 2, 3])
    for step in (2, 3):
        manifest.begin(manifest.folder(view.directory.checkpoints, step))
    manifest.commit(manifest.folder(view.directory.checkpoints, 3), [], step=3, samples=3, world_size=1)
    assert facts.kept_checkpoints(view) == [3]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2.345678, "2.3457"), (3e-6, "3e-06"), (12345.6, "12,346"), (0.0, "0"), (math.nan, "nan"),
     (-math.inf, "-inf"), (1e300, "1e+300"), (None, "")],
)  # fmt: skip
def test_numbers_are_short(value: float | None, expected: str) -> None:
    assert facts.number(value) == expected


def test_an_artifact_of_many_files_is_where_they_all_stand() -> None:
    files = [{"path": f"artifacts/adapter/{name}", "size": 5, "sha256": ""} for name in ("a/x", "b")]
    (found,) = facts.artifacts(_view(artifacts={"adapter": {"kind": "adapter", "files": files}}))
    assert (found.path, found.files, found.bytes) == ("artifacts/adapter", 2, 10)


def test_a_run_without_provenance_has_empty_facts(tmp_path: Path) -> None:
    assert facts.provenance(RunDirectory(tmp_path)) == facts.Provenance({}, "", "", {}, {})
