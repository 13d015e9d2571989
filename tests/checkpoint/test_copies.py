"""Ranks that train one model and come apart: real ranks, with gloo between them."""

from __future__ import annotations

from pathlib import Path

import copies_run
import pytest
from stoker.checkpoint import manifest

import ranks


@pytest.mark.parametrize("how", ["alone", "drawn"])
def test_weights_that_come_apart_are_not_saved(how: str, tmp_path: Path) -> None:
    said = ranks.run(copies_run.train, 2, tmp_path, tmp_path, how)
    assert said[0] == said[1]
    assert said[0].startswith("step 2: ")
    assert "differs between ranks 0 and 1, which hold copies, by " in said[0]
    assert "trainer.backward(loss_sum, weight) and trainer.update() instead of loss.backward()" in said[0]
    assert manifest.newest(tmp_path / "runs" / "test" / how / "checkpoints")[0] is None


@pytest.mark.parametrize(
    ("how", "settings", "size"),
    [
        ("rounding", {}, 2),
        ("together", {}, 3),
        ("together", {"parallel": "fsdp"}, 2),
        ("alone", {"parallel": "fsdp"}, 2),  # reduces by itself
    ],
)
def test_what_is_one_model_is_saved(how: str, settings: dict[str, object], size: int, tmp_path: Path) -> None:
    assert ranks.run(copies_run.train, size, tmp_path, tmp_path, how, **settings) == [""] * size
    log = (tmp_path / "runs" / "test" / how / "logs" / "rank-0.log").read_text()
    assert "ranks have changed buffers" not in log
    said = "step 2: weight differs between ranks 0 and 1, which hold copies, by 0."
    assert (said in log) == (how == "rounding")


@pytest.mark.parametrize(
    ("how", "name", "parallel"),
    [("buffer", "center", "ddp"), ("buffer", "center", "fsdp"), ("frozen", "bias", "ddp")],
)
def test_what_each_rank_changes_by_its_own_batches_is_told_once(
    how: str, name: str, parallel: str, tmp_path: Path
) -> None:
    settings = {"checkpoint_every": 1, "parallel": parallel}
    assert ranks.run(copies_run.train, 2, tmp_path, tmp_path, how, **settings) == ["", ""]
    log = (tmp_path / "runs" / "test" / how / "logs" / "rank-0.log").read_text()
    assert log.count(f"step 1: ranks have changed buffers or frozen weights differently ({name})") == 1
    assert log.count("ranks have changed") == 1
