"""What it costs that a run can be done again: recording what it is made from, deterministic mode.

python bench/reproduce.py [--quick] [--json FILE]
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from harness import Row, median, spread

HERE = Path(__file__).resolve()
REPOSITORY = HERE.parents[1]
FILES = 5_000


# -- recording: in a process of its own, which has imported nothing yet --------------------------


def record(source: str, cache: str, runs: str) -> float:
    """Seconds from nothing to a provenance folder that is written, as a run's start does it."""
    os.environ["STOKER_CACHE"] = cache
    from stoker.reproduce import provenance
    from stoker.run import artifacts

    target = Path("provenance")
    target.mkdir()
    begun = time.perf_counter()
    gathered = provenance.gather(Path(source), Path(runs))
    provenance.write(target, gathered, artifacts.store(Path(runs)))
    taken = time.perf_counter() - begun
    assert provenance.read_code(target).bundle is not None
    return taken


def recording(times: int) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
        generated = Path(folder) / "generated"
        _generate(generated)
        for name, source in (("this repository", REPOSITORY), (f"{FILES:,} files", generated)):
            rows += _recorded(name, source, Path(folder) / "kept", times)
    return rows


def _recorded(name: str, source: Path, kept: Path, times: int) -> list[Row]:
    """The first start of this user, and the one after it, in turn."""
    first, again = [], []
    for _ in range(times):
        shutil.rmtree(kept, ignore_errors=True)
        options = {"source": str(source), "cache": str(kept / "cache"), "runs": str(kept / "runs")}
        first.append(harness.measure(HERE, "record", **options))
        again.append(harness.measure(HERE, "record", **options))
    size = f"{_megabytes(source):.0f} MB"
    return [
        _within(f"recording at a first start, {name}, {size}", first),
        _within(f"the same at the next start, {name}", again),
    ]


def _within(what: str, seconds: Sequence[float]) -> Row:
    middle = median(seconds)
    return Row(what, "s", middle, spread=spread(seconds), goal="< 1 s", met=middle < 1)


def _generate(folder: Path) -> None:
    """A repository of many files: those of this library over and over, each with a line of its own."""
    texts = [file.read_text(encoding="utf-8") for file in sorted((REPOSITORY / "src").rglob("*.py"))]
    draw = random.Random(0)
    for number in range(FILES):
        file = folder / f"package_{number // 100}" / f"module_{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {number}\n{draw.choice(texts)}", encoding="utf-8")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)


def _megabytes(source: Path) -> float:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=source, check=True, capture_output=True, text=True)
    files = (source / name for name in listed.stdout.split("\0") if name)
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


# -- deterministic mode: both in one process, some steps each in turn ---------------------------


def steps(model: str, pairs: int, each: int) -> list[list[float]]:
    """CPU seconds of a step without and with deterministic mode, pair by pair."""
    import torch
    from stoker.engine import determinism

    step = _llama() if model == "llama" else _convolutions()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    def timed(deterministic: bool) -> float:
        if deterministic:
            determinism.require()
        else:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        step()
        begun = time.process_time()
        for _ in range(each):
            step()
        return (time.process_time() - begun) / each

    timed(False), timed(True)
    return [[timed(False), timed(True)] for _ in range(pairs)]


def _llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
    ))  # fmt: skip
    tokens = torch.randint(0, 2048, (8, 128))
    return _step(model, lambda: model(input_ids=tokens, labels=tokens).loss)


def _convolutions() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    return _step(model, lambda: nn.functional.cross_entropy(model(images), labels))


def _step(model: Any, loss: Any) -> Any:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def determined(pairs: int, each: int) -> list[Row]:
    rows = []
    for model in ("llama", "convolutions"):
        found: Sequence[Sequence[float]] = harness.measure(
            HERE, "steps", harness.KEEP_MEMORY, model=model, pairs=pairs, each=each
        )
        ratios = [with_it / without for without, with_it in found]
        rows.append(Row(
            f"deterministic=true on CPUs, {model}: CPU time a step over one without", "ms",
            1e3 * median([with_it for _, with_it in found]),
            {"without": 1e3 * median([without for without, _ in found])}, median(ratios), spread(ratios),
        ))  # fmt: skip
    return rows


def main() -> None:
    asked = harness.arguments(__doc__ or "")
    rows = recording(2 if asked.quick else 7) + determined(*((5, 5) if asked.quick else (15, 10)))
    harness.report(rows, asked.json)


if __name__ == "__main__":
    if not harness.answer_measure({"record": record, "steps": steps}):
        main()
