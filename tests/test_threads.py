"""How a command ends whose process has threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stoker

from support import SOAK

SOURCE = Path(stoker.__file__).parent

SCRIPT = """
import atexit
import threading
import time
from pathlib import Path

import stoker
import torch

left_open = open("left-open", "w")
read = open(__file__)


def work() -> None:
    x = torch.randn(300, 300)
    while True:
        x @ x


def write_late() -> None:
    time.sleep(0.5)
    Path("thread").write_text("written")


def train(run: stoker.Run) -> None:
    run.log(loss=1.0)
    left_open.write("written")
    atexit.register(Path("at-exit").write_text, "written")
    threading.Thread(target=work, daemon=True).start()
    threading.Thread(target=write_late).start()
    print("trained", end="")


if __name__ == "__main__":
    stoker.main(train)
"""

READING = """
import psutil
from pyarrow import parquet
from stoker.run import media

content = media.table([{"a": 1, "b": "x"}], None).content
before = psutil.Process().num_threads()
assert media.read_table(content) == (["a", "b"], [[1, "x"]])
print(psutil.Process().num_threads() - before, "more")
"""


@pytest.mark.soak
@pytest.mark.parametrize("how", [["script.py"], *([["-m", "stoker", "train", "script.py"]] if SOAK else [])])
def test_a_daemon_thread_within_torch_does_not_abort_a_command_that_is_done(
    how: list[str], tmp_path: Path
) -> None:
    """The same script without the command, `sys.exit` alone, is aborted nearly every time."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *how], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "STOKER_SINKS": "none", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("trained")
    assert "terminate called" not in done.stderr
    assert {
        name: (tmp_path / name).read_text() for name in ("left-open", "at-exit", "thread")
    } == dict.fromkeys(("left-open", "at-exit", "thread"), "written")


@pytest.mark.soak
@pytest.mark.parametrize("module", ["cProfile", "trace"] if SOAK else ["cProfile"])
def test_what_looks_on_gets_to_write_what_it_saw(module: str, tmp_path: Path) -> None:
    looks_on = {"cProfile": ["-o", "seen"], "trace": ["--count", "--missing", "--coverdir", "seen"]}[module]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("threading.Thread(target=work", "threading.Thread(target=write_late"))
    ignored = ["--ignore-dir", f"{sys.prefix}:{sys.base_prefix}:{SOURCE}"] if module == "trace" else []
    done = subprocess.run(
        [sys.executable, "-m", module, *looks_on, *ignored, str(script)], cwd=tmp_path, capture_output=True,
        text=True, check=False, env={**os.environ, "STOKER_SINKS": "none"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").exists()


@pytest.mark.soak(small=False)
def test_a_debugger_gets_to_ask_again(tmp_path: Path) -> None:
    """As a profiler gets to write."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "pdb", "-c", "continue", str(script)], cwd=tmp_path, input="q\n",
        capture_output=True, text=True, check=False, env={**os.environ, "STOKER_SINKS": "none"},
    )  # fmt: skip
    assert "The program exited via sys.exit(). Exit status: 0" in done.stdout, done.stderr


def test_a_table_is_read_without_a_thread_of_pyarrow(tmp_path: Path) -> None:
    """A process that ended at once was aborted with it as it began."""
    done = subprocess.run(
        [sys.executable, "-c", READING], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "0 more\n"), done.stderr
