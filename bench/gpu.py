"""What the training loop costs on a GPU over one written by hand, beside transformers' Trainer.

python bench/gpu.py [--smoke] [--json FILE]

One file that needs no network, torch and transformers besides stoker itself; run it where there is
a GPU. Ours and the hand-written loop alternate in one process, on the same Llama, data, optimizer and
precision. `--smoke` runs everything small, on a CPU too, to see that it runs: its figures say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
os.environ.setdefault("STOKER_SINKS", "none")

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

Chunk = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained."""

    hidden: int
    layers: int
    vocabulary: int
    length: int
    batch: int
    steps: int
    rounds: int


WHOLE = Size(hidden=1024, layers=16, vocabulary=32_000, length=2048, batch=8, steps=20, rounds=7)
SMOKE = Size(hidden=64, layers=2, vocabulary=256, length=32, batch=2, steps=2, rounds=2)


def model(size: Size, device: torch.device) -> Any:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers, num_attention_heads=max(1, size.hidden // 64),
        max_position_embeddings=size.length,
    )  # fmt: skip
    return LlamaForCausalLM(shape).to(device)


class Rows(torch.utils.data.Dataset[Any]):
    """Rows of random tokens."""

    def __init__(self, size: Size) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, size.vocabulary, (256, size.length), generator=drawn)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def loss_of(output: Any, batch: Any) -> tuple[Any, Any]:
    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total, torch.full((), labels.numel(), device=labels.device)


def optimizer_of(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def by_hand(size: Size, device: torch.device, precision: str, accumulate: int) -> Chunk:
    made = model(size, device)
    parameters = list(made.parameters())
    optimizer = optimizer_of(parameters)
    batches = _endless(
        torch.utils.data.DataLoader(Rows(size), batch_size=size.batch, shuffle=True, pin_memory=True)
    )
    enabled = precision == "bf16"

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = {k: v.to(device, non_blocking=True) for k, v in next(batches).items()}
            weight = batch["labels"][:, 1:].numel()
            for start in range(0, size.batch, size.batch // accumulate):
                part = {k: v[start : start + size.batch // accumulate] for k, v in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                    total, _ = loss_of(made(input_ids=part["input_ids"], use_cache=False), part)
                (total / weight).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def ours(size: Size, device: torch.device, precision: str, accumulate: int) -> Chunk:
    import stoker

    run = stoker.Run("bench")
    trainer = stoker.Trainer(
        run, model(size, device), optimizer=optimizer_of, loss=loss_of,
        inputs=lambda batch: {"input_ids": batch["input_ids"], "use_cache": False},
        training=stoker.Training(
            parallel="single", precision=precision, clip_norm=1.0, checkpoint_every="10h",
            micro_batch=size.batch // accumulate,
        ),
    )  # fmt: skip
    batches = trainer.steps(trainer.loader(Rows(size), batch_size=size.batch), max_steps=10**6)

    def steps(count: int) -> None:
        for _ in range(count):
            run.log(loss=trainer.step(next(batches)))

    return steps


def hf_trainer(size: Size, device: torch.device, precision: str, accumulate: int) -> float:
    """Seconds a step of transformers' Trainer; it needs accelerate."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(device)
            times.append(time.perf_counter())

    Trainer(
        model=model(size, device), train_dataset=Rows(size), callbacks=[Steps()],
        args=TrainingArguments(
            output_dir="hf", max_steps=size.steps + 3, per_device_train_batch_size=size.batch // accumulate,
            gradient_accumulation_steps=accumulate, learning_rate=1e-4, max_grad_norm=1.0, logging_steps=1,
            report_to=[], save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
            bf16=precision == "bf16", use_cpu=device.type == "cpu",
        ),
    ).train()  # fmt: skip
    return (times[-1] - times[2]) / (len(times) - 3)


def timed(loop: Chunk, steps: int, device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    loop(steps)
    _wait(device)
    return (time.perf_counter() - begun) / steps


def measure(size: Size, device: torch.device, precision: str, accumulate: int) -> dict[str, Any]:
    """One row: seconds a step in turn, and the ratio pair by pair."""
    what = (size, device, precision, accumulate)
    loops = {"ours": ours(*what), "by hand": by_hand(*what)}
    peaks = {}
    for name, loop in loops.items():
        _reset_peak(device)
        loop(3)
        peaks[name] = _peak(device)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(size.rounds):
        for name in loops if number % 2 == 0 else reversed(loops):
            seconds[name].append(timed(loops[name], size.steps, device))
    ratios = [mine / hand for mine, hand in zip(seconds["ours"], seconds["by hand"], strict=True)]
    del loops
    gc.collect()
    tokens = size.batch * size.length
    peers = {"by hand": tokens / statistics.median(seconds["by hand"])}
    try:
        peers["hf_trainer"] = tokens / hf_trainer(*what)
    except ImportError as error:
        print(f"hf_trainer: {error}", file=sys.stderr)
    ratio = statistics.median(ratios)
    return {
        "measure": f"single, {precision}, {accumulate} micro-batches: time a step over one by hand",
        "ours": tokens / statistics.median(seconds["ours"]), "peers": peers, "unit": "tok/s", "ratio": ratio,
        "spread": [min(ratios), max(ratios)], "goal": "≤ 1.03×", "met": ratio <= 1.03,
        "peak_bytes": peaks,
    }  # fmt: skip


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="everything small, on a CPU too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file as well")
    asked = parser.parse_args()
    if not asked.smoke and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --smoke runs it small on the CPU")
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SMOKE if asked.smoke else WHOLE
    file = asked.json and asked.json.absolute()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    rows = []
    for precision, accumulate in (("bf16", 1), ("bf16", 2), ("fp32", 1)):
        if precision == "fp32":  # several times as slow a step
            size = dataclasses.replace(size, steps=max(2, size.steps // 4))
        with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
            os.chdir(folder)
            row = measure(size, device, precision, accumulate)
        rows.append({**row, "device": name, "torch": torch.__version__, "smoke": asked.smoke})
        peers = ", ".join(f"{k} {v:,.0f}" for k, v in row["peers"].items())
        low, high = row["spread"]
        print(
            f"{row['measure']}: {row['ours']:,.0f} tok/s ({peers}), {row['ratio']:.3f} ({low:.3f}–{high:.3f})"
        )
        if file:
            file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
