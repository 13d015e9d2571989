"""The documentation as pages: `make docs`, of which a warning is an error."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from stoker.cli.main import app

ROOT = Path(__file__).resolve().parent.parent


def test_every_link_leads_somewhere_and_the_references_are_the_program_s(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = {page: (tmp_path / f"{page}.html").read_text() for page in ("python", "generated/cli", "index")}
    assert 'id="stoker.Trainer.step"' in pages["python"]
    assert 'id="stoker-checkpoints-verify"' in pages["generated/cli"]
    assert "lora.rank" in (tmp_path / "generated/recipe-llm.html").read_text()
    assert 'href="fine-tuning.html' in pages["index"]


OF_OTHERS = set(
    """
    --account --chdir --cpus-per-task --debug --gpus-per-node --gpus-per-task --hash --head --job-name
    --local_rank --logdir --mem --no-deps --nproc-per-node --ntasks-per-node --num_gpus --num_processes
    --open-mode --options --partition --password --requeue --signal --standalone --wait
    """.split()  # noqa: SIM905
)
"""Options of pip, torchrun, sbatch and others that the pages name."""


def test_every_option_in_the_pages_is_one_of_the_program_s() -> None:
    known = {"--help", *_options(typer.main.get_command(app()))}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", page.read_text(encoding="utf-8")))
        assert named <= known | OF_OTHERS, page.name


def _options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    for inner in getattr(command, "commands", {}).values():
        yield from _options(inner)
