"""A sweep's file of W&B is answered with the same search as a command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from stoker.errors import BadInput
from stoker.tune.space_reading import parse


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 0.1
    batch_size: int = 8


def _parsed(tmp_path: Path, content: dict[str, Any]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    parse((), Config, file)


def test_a_whole_file_is_a_command(tmp_path: Path) -> None:
    content = {
        "program": "train.py", "method": "bayes", "run_cap": 30,
        "metric": {"name": "val_loss", "goal": "minimize"}, "early_terminate": {"type": "hyperband"},
        "parameters": {
            "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
            "batch_size": {"values": [16, 32]}, "layers": {"min": 2, "max": 6}, "epochs": {"value": 3},
            "lora": {"parameters": {"dropout": {"min": 0.0, "max": 0.5, "q": 0.1}}},
        },
    }  # fmt: skip
    command = (
        "stoker sweep RECIPE 'lr=log(1e-05, 0.001)' 'batch_size=[16, 32]' 'layers=int(2, 6)' epochs=3 "
        "'lora.dropout=uniform(0.0, 0.5, step=0.1)' "
        "--sampler gp --metric val_loss --goal min --scheduler hyperband --trials 30"
    )
    with pytest.raises(BadInput) as refused:
        _parsed(tmp_path, content)
    assert str(refused.value) == f"{tmp_path}/sweep.yaml is a sweep of W&B; the same here: {command}"


@pytest.mark.parametrize(
    "given", [{"mu": 0, "sigma": 1}, {"min": 0.5}, {"min": 2, "max": 1}, {"min": 0, "max": 1, "q": 0.3}, 3,
              {"min": 0.0, "max": 1.0, "distribution": "beta"}, {"min": "small", "max": "large"}],
)  # fmt: skip
def test_what_has_no_equivalent_is_left_open(given: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"RECIPE lr=\.\.\. --sampler random$"):
        _parsed(tmp_path, {"method": "random", "parameters": {"lr": given}})


def test_a_recipes_own_keys_are_no_sweep_of_others(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown key 'method'"):
        _parsed(tmp_path, {"method": "adam", "lr": 0.1})
