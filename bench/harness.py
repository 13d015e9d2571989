"""What every benchmark shares: measuring in fresh processes, in turn, and saying what came out.

A row is a measure: ours, the peers', the ratio of medians pair by pair, its spread, the goal.
The machine is noisy, so ours and a peer are always measured one right after the other, and
what is quoted is the median over such pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil


@dataclass
class Row:
    """One measure. `ratio` is the median over pairs of what `unit` says the goal is about."""

    measure: str
    unit: str
    ours: float
    peers: dict[str, float] = field(default_factory=dict)
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    """The lowest and the highest ratio of a pair, or figure of ours where there is no peer."""
    goal: str = ""
    met: bool | None = None


def parser(description: str) -> argparse.ArgumentParser:
    """`--quick`: the same on less, within a minute; `--json FILE`: the rows as JSON too."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="the same on less, within a minute")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file as well")
    return made


def arguments(description: str) -> argparse.Namespace:
    """What was asked for, of what `parser` has."""
    return parser(description).parse_args()


KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "67108864",
}  # fmt: skip
"""Variables by which the allocator keeps what is freed. By default it gives the top of the heap back and
takes it again, a page fault at a time, in some steps and not in others: up to 2% of a step of a small model,
by where things happen to lie."""


def measure(
    script: Path,
    what: str,
    variables: Mapping[str, str] | None = None,
    *,
    within: Path | None = None,
    **options: Any,
) -> Any:
    """Run `script --measure WHAT` in a process and a folder of its own; returns what it answers.

    The answer is the last line of its standard output, as JSON.

    Args:
        variables: of its environment, beside this one's.
        within: a folder in which its own stays; by default that is removed. Where many files were removed,
            ext4 takes ten times as long to make one, for five minutes.
    """
    with _folder(within) as folder:
        command = [sys.executable, str(script), "--measure", what, "--options", json.dumps(options)]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**_environment(), **(variables or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0 or not done.stdout.strip():
        raise RuntimeError(
            f"{what} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextlib.contextmanager
def _folder(within: Path | None) -> Iterator[str]:
    if within is not None:
        yield tempfile.mkdtemp(dir=within)
        return
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        yield folder


def answer_measure(measures: dict[str, Callable[..., Any]]) -> bool:
    """In a process that `measure` started: do what it asks. Whether this is such a process."""
    if "--measure" not in sys.argv:
        return False
    what = sys.argv[sys.argv.index("--measure") + 1]
    options = json.loads(sys.argv[sys.argv.index("--options") + 1])
    print(json.dumps(measures[what](**options)), flush=True)
    return True


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def report(rows: Sequence[Row], file: Path | None) -> None:
    """Print the rows as a Markdown table, with the machine; write them as JSON where asked to."""
    print(f"\n{machine()}\n")
    print("| measure | ours | peers | ratio (lowest – highest) | goal | met |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        peers = ", ".join(f"{name} {figure(value)}" for name, value in row.peers.items())
        ratio = "" if row.ratio is None else f"{figure(row.ratio)}"
        if row.spread is not None:
            ratio = f"{ratio} ({figure(row.spread[0])} – {figure(row.spread[1])})".strip()
        met = "" if row.met is None else "yes" if row.met else "no"
        print(f"| {row.measure} | {figure(row.ours)} {row.unit} | {peers} | {ratio} | {row.goal} | {met} |")
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> str:
    """The machine in words."""
    memory = psutil.virtual_memory().total / 2**30
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{os.cpu_count()} cores ({name}), {memory:.0f} GiB, Python {platform.python_version()}"


def _environment() -> dict[str, str]:
    quiet = {
        "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true",
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "STOKER_SINKS": "none", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    return {**os.environ, **quiet}
