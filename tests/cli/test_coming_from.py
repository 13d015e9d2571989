"""What docs/coming-from-trainers.md says: its scripts run, and its keys are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from stoker import config
from stoker.recipes import llm

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from-trainers.md").read_text(encoding="utf-8")
SCRIPTS = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "stoker.main" in block]


@pytest.mark.parametrize("number", range(2))
def test_a_script_of_ours_runs_and_learns_the_same_on_two_ranks(  # type: ignore[no-untyped-def]
    number: int, stoker, tmp_path: Path
) -> None:
    (tmp_path / "digits.py").write_text(SCRIPTS[number])
    same = ("train", "digits.py", "precision=fp32", "epochs=5", "--json")
    alone = stoker(*same, "--name", "a")
    assert alone.code == 0, alone.err
    several = stoker(*same, "--name", "b", "--nproc", "2", "micro_batch=8")
    assert several.code == 0, several.err
    (name,) = (n for n in alone.answer["metrics"] if n.startswith("val_"))
    value = alone.answer["metrics"][name]
    assert value > 0.8 if name == "val_accuracy" else value < 1.0
    assert several.answer["metrics"][name] == pytest.approx(value, abs=1e-4)


def test_its_config_is_one_of_the_language_recipe(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "a.yaml").write_text(block)
    found = config.resolve(llm.Config, (), tmp_path / "a.yaml").config
    assert (found.lora.rank, found.batch_size, str(found.eval_every)) == (16, 32, "0.25ep")


def test_the_keys_that_it_names_are_keys_of_the_language_recipe() -> None:
    keys = set(config.describe(llm.Config))
    known = keys | {key.partition(".")[0] for key in keys}
    rows = _section("From transformers' Trainer") + _section("From Axolotl")
    cells = [row.rstrip(" |").rpartition(" | ")[2] for row in rows]
    named = {
        key
        for cell in cells
        for code in re.findall(r"`([^`]+)`", cell)
        if not code.startswith("stoker ")
        for key in re.findall(r"(?:^| )([a-z][a-z_.]*)(?:=|: )", code.partition("{")[0])
    }
    assert len(named) > 30
    assert named <= known


def _section(title: str) -> list[str]:
    """The rows of the tables below a heading."""
    text = PAGE.partition(f"## {title}")[2].partition("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| ")]
