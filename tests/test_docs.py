"""The documentation as pages: `make docs`, of which a warning is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
