"""`make demo`, made short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import SOAK

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.mark.soak
def test_it_trains_tunes_and_says_what_came_of_it(tmp_path: Path) -> None:
    short = [
        "max_steps=2", "eval_every=2", "sequence_length=32", "batch_size=16", "generate_tokens=4",
        "validation=0.02", "test=0.005",
    ]  # fmt: skip
    if not SOAK:  # in place of Python's documents, which take longer to read than all else
        numbers = ({"prompt": f"What is {n}?", "completion": f"The number after {n - 1}."} for n in range(80))
        (tmp_path / "numbers.jsonl").write_text("\n".join(map(json.dumps, numbers)))
        short += ["data=numbers.jsonl", "validation=0.1", "test=0.1"]
    done = subprocess.run(
        [sys.executable, str(DEMO), *short], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    generated, _, figures = done.stdout.split("=" * 80)[1].rpartition("-" * 80)
    assert generated.count("-" * 80) == 1  # two generations
    assert all(len(part.split()) > 4 for part in generated.split("-" * 80))
    assert "test perplexity on answers, fine-tuned" in figures
    assert (tmp_path / "runs" / "demo" / "lora" / "artifacts" / "report.html").exists()
