"""Fine-tuning a 7B model on one GPU, whole and with LoRA, beside transformers' Trainer.

python bench/gpu_llm.py [--optimizer adafactor|adamw8bit] [--compile] [--liger] [--length N] [--rounds N]
                        [--smoke] [--json FILE]

It needs no network: random weights in the shape of Llama 2 7B, in bf16, on text that is made here and can be
learnt. torch, transformers and what stoker itself needs are to be there; accelerate for the peer, peft for
LoRA, torchao for AdamW with 8-bit states: what is not installed is left out, and said. Each figure is of a
process of its own, ours and the peer's in turn. A step is of 16,384 tokens, 4,096 in a forward pass, none of
them padding.

Where all weights are trained, ours keeps them and their gradients in float32, 54 GB, and computes in bf16, as
updates are smaller than one step of bf16; the peer keeps both in bf16, 27 GB. AdamW's two moments in float32
would be 54 more, so the optimizer is Adafactor, whose are a row and a column of each matrix, or AdamW with
8-bit ones, 13.5 GB.

`--compile` has torch compile both: ours block by block, the peer as it does. `--liger` has both use
liger-kernel's norms, rotary embeddings and feed-forward layers; the peer takes its loss, too.

`--smoke` goes every way with a tiny model, on a CPU too: its figures say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("STOKER_SINKS", "none")

import harness
import torch
from harness import Row
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve()
FULL, LORA = "every weight", "LoRA"


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    shape: dict[str, int]
    lengths: tuple[int, ...]
    """Tokens of a row, one measurement each."""
    tokens: int = 4096
    """Of a forward pass."""
    parts: int = 4
    """Forward passes of a step."""
    steps: int = 12
    warm_up: int = 3


WHOLE = Size(shape={}, lengths=(2048, 4096))  # LlamaConfig's own shape is that of Llama 2 7B
SMOKE = Size(
    shape={
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    lengths=(16, 32), tokens=64, parts=2, steps=3, warm_up=1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fused:
    """What both sides use in place of transformers' operations one by one."""

    compile: bool = False
    liger: bool = False

    def __str__(self) -> str:
        return "".join(f", {name}" for name, used in vars(self).items() if used)


# -- what both train --------------------------------------------------------------------------


def model_of(size: Size, kind: str, device: torch.device) -> Any:
    """The same weights each time, with adapters or without."""
    torch.manual_seed(0)
    shape = LlamaConfig(**size.shape, max_position_embeddings=4096, attn_implementation="sdpa")
    with device:
        model = LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16)
    if kind == FULL:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    )


class Rows(torch.utils.data.Dataset[Any]):
    """Rows of tokens in which each mostly decides the next, so that there is something to learn."""

    def __init__(self, vocabulary: int, length: int, count: int) -> None:
        drawn = torch.Generator().manual_seed(0)
        following = torch.randperm(vocabulary, generator=drawn)
        ids = torch.randint(0, vocabulary, (count, length), generator=drawn)
        strays = torch.rand(count, length, generator=drawn) < 0.1
        for place in range(1, length):
            ids[:, place] = torch.where(strays[:, place], ids[:, place], following[ids[:, place - 1]])
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def rows_of(size: Size, length: int) -> Rows:
    vocabulary = LlamaConfig(**size.shape).vocab_size
    rows = size.tokens // length * size.parts
    return Rows(vocabulary, length, rows * (size.steps + size.warm_up))


def optimizer_of(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    if name == "adamw8bit":
        from torchao.optim import AdamW8bit

        return lambda parameters: AdamW8bit(parameters, lr=1e-4)
    if name == "adamw":
        return lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    # One parameter after the other: all at once it needs float32 copies of all weights.
    return lambda parameters: torch.optim.Adafactor(parameters, lr=1e-4, foreach=False)


def flops_of(model: Any, length: int) -> float:
    """Operations that a token needs: see `stoker.language.flops`, here without adapters' own."""
    config = model.config
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            total += (6 if module.weight.requires_grad else 4) * module.weight.numel()
    return total + 12 * config.num_hidden_layers * config.hidden_size * (length + 1) / 2


@dataclasses.dataclass
class Clock:
    """The end of each step, and its loss."""

    device: torch.device
    warm_up: int
    ends: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)

    def step(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())

    def answer(self) -> dict[str, Any]:
        ends = itertools.pairwise(self.ends[self.warm_up - 1 :])
        taken = [after - before for before, after in ends]
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": statistics.median(taken), "peak": peak, "losses": self.losses}


# -- measures ---------------------------------------------------------------------------------


def train(
    who: str,
    kind: str,
    length: int,
    optimizer: str,
    smoke: bool,
    at_once: bool = False,
    fused: dict[str, bool] | None = None,
) -> Any:
    """Seconds a step, peak of memory in bytes, and losses; what the operations of a token are, of ours.

    Args:
        at_once: a step is one forward pass, and weights are updated within the backward pass.
        fused: as `Fused` has it.
    """
    warnings.simplefilter("ignore")
    size = SMOKE if smoke else WHOLE
    if at_once:
        size = dataclasses.replace(size, parts=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, size.warm_up)
    side = {"ours": ours, "hf_trainer": hf_trainer}[who]
    return side(size, kind, length, optimizer, clock, at_once, Fused(**(fused or {})))


def ours(
    size: Size, kind: str, length: int, optimizer: str, clock: Clock, at_once: bool, fused: Fused
) -> dict[str, Any]:
    import stoker
    from stoker.engine.flops import peak
    from stoker.language import attention, kernels, objective

    model = model_of(size, kind, clock.device)
    bare = model.get_base_model() if kind == LORA else model
    bare.set_attn_implementation(attention.NAME)
    kernels.use(model, "liger" if fused.liger else "torch")
    called = objective.attach(model)
    needed = flops_of(bare, length)
    rows = size.tokens // length
    own: dict[str, Any] = {"optimizer_in_backward": True} if at_once else {"micro_batch": rows}
    trainer = stoker.Trainer(
        stoker.Run("bench"), model, optimizer=optimizer_of(optimizer), inputs=called.inputs, loss=called.loss,
        training=stoker.Training(
            parallel="single", precision="bf16", checkpoint_every="10h", compile=fused.compile, **own
        ),
    )  # fmt: skip
    losses = []
    loader = trainer.loader(rows_of(size, length), batch_size=rows * size.parts, shuffle=False)
    batches = trainer.steps(loader, max_steps=size.steps + size.warm_up + 1)
    for _ in range(size.steps + size.warm_up):
        batch = next(batches)
        batch["documents"] = torch.full((len(batch["input_ids"]), 1), length)
        losses.append(trainer.step(batch))
        clock.step()
    clock.losses = [loss.item() for loss in losses]
    best = peak(clock.device, "bf16")
    return {**clock.answer(), "flops": needed, "peak_flops": best.flops, "peak_source": best.source}


def hf_trainer(
    size: Size, kind: str, length: int, optimizer: str, clock: Clock, at_once: bool, fused: Fused
) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    model = model_of(size, kind, clock.device)
    made = optimizer_of(optimizer)([p for p in model.parameters() if p.requires_grad])
    trainer = Trainer(
        model=model, train_dataset=rows_of(size, length), callbacks=[Steps()],
        optimizers=(made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0)),
        args=TrainingArguments(
            output_dir="hf", max_steps=size.steps + size.warm_up, bf16=True, max_grad_norm=0.0,
            per_device_train_batch_size=size.tokens // length, gradient_accumulation_steps=size.parts,
            logging_steps=1, train_sampling_strategy="sequential", report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=clock.device.type == "cpu", torch_compile=fused.compile,
            use_liger_kernel=fused.liger,
        ),
    )  # fmt: skip
    trainer.train()
    clock.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.answer()


# -- the table --------------------------------------------------------------------------------


def rows_of_a_kind(
    run: Callable[..., Any], kind: str, length: int, optimizer: str, rounds: int, smoke: bool, fused: Fused
) -> list[Row]:
    """Speed, share of the peak, memory and loss of ours and of the peer."""
    size = SMOKE if smoke else WHOLE
    whom = ["ours", *(["hf_trainer"] if _there("accelerate") else [])]
    found: dict[str, list[Any]] = {who: [] for who in whom}
    for _ in range(rounds):
        for who, held in found.items():
            held.append(
                run(
                    "train", who=who, kind=kind, length=length, optimizer=optimizer, smoke=smoke,
                    fused=vars(fused),
                )
            )  # fmt: skip
    return _rows(f"{kind}, {optimizer}{fused}, rows of {length:,}", size.tokens * size.parts, found)


def rows_within_backward(
    run: Callable[..., Any], length: int, optimizer: str, smoke: bool, fused: Fused
) -> list[Row]:
    """Ours alone: each weight updated as soon as its gradient is there, which is then let go of."""
    import stoker

    if "optimizer_in_backward" not in {field.name for field in dataclasses.fields(stoker.Training)}:
        return []
    found = run(
        "train", who="ours", kind=FULL, length=length, optimizer=optimizer, smoke=smoke, at_once=True,
        fused=vars(fused),
    )  # fmt: skip
    size = SMOKE if smoke else WHOLE
    name = f"{FULL}, {optimizer}{fused} in the backward pass, rows of {length:,}"
    return _rows(name, size.tokens, {"ours": [found]})


def _rows(name: str, tokens: int, found: dict[str, list[Any]]) -> list[Row]:
    rates = {who: [tokens / one["seconds"] for one in held] for who, held in found.items()}
    middle = {who: statistics.median(of) for who, of in rates.items()}
    first = {who: held[0] for who, held in found.items()}
    mine = first.pop("ours")
    share = {who: 100 * rate * mine["flops"] / mine["peak_flops"] for who, rate in middle.items()}
    rows = [
        Row(f"{name}: tokens a second", "tok/s", middle.pop("ours"), middle),
        Row(f"{name}: MFU, of {mine['peak_flops'] / 1e12:,.0f} TFLOP/s ({mine['peak_source']})", "%",
            share.pop("ours"), share, goal="≥ 50 %"),
        Row(f"{name}: peak of memory", "GB", mine["peak"] / 1e9,
            {who: one["peak"] / 1e9 for who, one in first.items()}),
    ]  # fmt: skip
    rows[1].met = rows[1].ours >= 50
    for who, one in first.items():
        ratios = [a / b for a, b in zip(rates["ours"], rates[who], strict=True)]
        rows[0].ratio, rows[0].spread = statistics.median(ratios), (min(ratios), max(ratios))
        apart = max(abs(a - b) / b for a, b in zip(mine["losses"], one["losses"], strict=True))
        rows.append(
            Row(f"{name}: loss of the last step; ratio: the largest difference of a step", "nats",
                mine["losses"][-1], {who: one["losses"][-1]}, apart, goal="≤ 0.1 %", met=apart <= 0.001)
        )  # fmt: skip
    return rows


def _there(module: str) -> bool:
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"{module} is not installed: what needs it is left out", file=sys.stderr)
    return found


def table(
    run: Callable[..., Any],
    optimizer: str,
    rounds: int,
    smoke: bool,
    only: int | None = None,
    fused: Fused = Fused(),
) -> list[Row]:
    """All rows.

    Args:
        run: `harness.measure`, or what calls a measure of this file in this process.
        only: this length of a row.
    """
    made: list[Row] = []
    for length in (SMOKE if smoke else WHOLE).lengths if only is None else (only,):
        if _there("peft"):
            made += rows_of_a_kind(run, LORA, length, "adamw", rounds, smoke, fused)
        made += rows_of_a_kind(run, FULL, length, optimizer, rounds, smoke, fused)
        made += rows_within_backward(run, length, optimizer, smoke, fused)
    return made


def here(what: str, **options: Any) -> Any:
    """A measure, in this process."""
    return MEASURES[what](**options)


def apart(what: str, **options: Any) -> Any:
    """A measure, in a process of its own, which has the GPU's memory to itself."""
    return harness.measure(HERE, what, **options)


MEASURES = {"train": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--optimizer", choices=("adafactor", "adamw8bit"), default="adafactor")
    parser.add_argument("--compile", action="store_true", help="compile both")
    parser.add_argument("--liger", action="store_true", help="liger-kernel's operations for both")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="pairs of ours and the peer")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a row; by default 2048, then 4096")
    parser.add_argument("--smoke", action="store_true", help="everything small, on a CPU too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file as well")
    asked = parser.parse_args()
    if not asked.smoke and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --smoke runs it small on the CPU")
    if asked.optimizer == "adamw8bit" and not _there("torchao"):
        sys.exit("--optimizer adamw8bit needs torchao")
    if asked.liger and (asked.smoke or not _there("liger_kernel")):
        sys.exit("--liger needs liger-kernel and a GPU")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
    rounds = 1 if asked.smoke else asked.rounds
    fused = Fused(asked.compile, asked.liger)
    harness.report(table(apart, asked.optimizer, rounds, asked.smoke, asked.length, fused), asked.json)


if __name__ == "__main__":
    if not harness.answer_measure(MEASURES):
        main()
