"""What the training loop costs over one written by hand, beside its peers, in the same run.

python bench/engine.py [--quick] [--json FILE]

CPU time (of all threads of a process, summed over ranks) is what is compared, one OpenMP thread a
rank: wall time on a shared machine says more of its other guests. Ours and the hand-written loop
alternate, some steps each, in one process, on the same model, data, optimizer and clipping.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
from harness import Row, median, spread

HERE = Path(__file__).resolve()
BATCH, LENGTH, VOCABULARY = 8, 128, 1024
STRATEGIES = {"ddp": 2, "fsdp": 2}


# -- what is trained --------------------------------------------------------------------------


def model() -> Any:
    """A Llama of 1.1 million parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
            num_attention_heads=4,
        )
    )  # fmt: skip


def rows() -> Any:
    """Rows of random tokens, all of which count but the last of each."""
    import torch

    class Rows(torch.utils.data.Dataset[Any]):
        ids = torch.randint(0, VOCABULARY, (1024, LENGTH), generator=torch.Generator().manual_seed(0))

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, index: int) -> Any:
            return {"input_ids": self.ids[index], "labels": self.ids[index]}

    return Rows()


def loss_of(output: Any, batch: Any) -> tuple[Any, Any]:
    from torch.nn import functional as F

    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total, (labels != -100).sum()


def optimizer_of(parameters: Any) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


Chunk = Callable[[int], None]


def by_hand(strategy: str) -> Chunk:
    """The loop one writes: DataLoader, forward, mean over all ranks' tokens, backward, clip, step."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    made = model()
    called: Any = made
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if strategy == "ddp":
        called = DistributedDataParallel(made, gradient_as_bucket_view=True)
    elif strategy == "fsdp":
        for layer in made.model.layers:
            fully_shard(layer)
        fully_shard(made)
    parameters = list(made.parameters())
    optimizer = optimizer_of(parameters)
    data = rows()
    sampler = torch.utils.data.DistributedSampler(data, size, rank, seed=0)
    batches = _endless(torch.utils.data.DataLoader(data, batch_size=BATCH // size, sampler=sampler))

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = next(batches)
            total, weight = loss_of(called(input_ids=batch["input_ids"], use_cache=False), batch)
            sums = torch.stack([total.detach().double(), weight.double()])
            if size > 1:
                dist.all_reduce(sums)
            (total * (size / sums[1])).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            float(sums[0] / sums[1])

    return run


def ours(strategy: str) -> Chunk:
    import stoker
    from stoker.duration import Duration

    run = stoker.Run("bench", "ours")
    trainer = stoker.Trainer(
        run, model(), optimizer=optimizer_of, loss=loss_of,
        inputs=lambda batch: {"input_ids": batch["input_ids"], "use_cache": False},
        training=stoker.Training(
            parallel=strategy, precision="fp32", clip_norm=1.0, checkpoint_every=Duration.parse("10h")
        ),
    )  # fmt: skip
    batches = trainer.steps(trainer.loader(rows(), batch_size=BATCH), max_steps=10**6)

    def steps(count: int) -> None:
        for _ in range(count):
            run.log(loss=trainer.step(next(batches)))

    return steps


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# -- measures ---------------------------------------------------------------------------------


def alternate(strategy: str, rounds: int, steps: int) -> list[tuple[float, float]]:
    """CPU seconds a step, ours and by hand, in turn, on this rank."""
    warnings.simplefilter("ignore")
    loops = (ours(strategy), by_hand(strategy))
    for loop in loops:
        loop(5)
    found = []
    for number in range(rounds):
        taken = {}
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            begun = time.process_time()
            loops[which](steps)
            taken[which] = (time.process_time() - begun) / steps
        found.append((taken[0], taken[1]))
    return found


def pairs(strategy: str, ranks: int, rounds: int, steps: int) -> list[tuple[float, float]]:
    """The same, summed over ranks."""
    import torch

    torch.set_num_threads(1)
    if ranks == 1:
        return alternate(strategy, rounds, steps)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(strategy, r, ranks, port, folder, rounds, steps))
            for r in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        parts = [json.loads((Path(folder) / str(r)).read_text()) for r in range(ranks)]
    return [
        (sum(part[n][0] for part in parts), sum(part[n][1] for part in parts)) for n in range(len(parts[0]))
    ]


def _rank(strategy: str, rank: int, size: int, port: int, folder: str, rounds: int, steps: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID=str(port),
    )  # fmt: skip
    found = alternate(strategy, rounds, steps)
    (Path(folder) / str(rank)).write_text(json.dumps(found))
    os._exit(0)


def peer(name: str, rounds: int, steps: int) -> list[tuple[float, float]]:
    """CPU seconds a step of a peer and by hand, in turn: the latter's steps are made between the peer's."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    clock = Clock(by_hand("single"), rounds, steps)
    PEERS[name](clock)
    return clock.pairs


def hf_trainer(clock: Clock) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    Trainer(
        model=model(), train_dataset=rows(), callbacks=[Steps()],
        args=TrainingArguments(
            output_dir="hf", max_steps=clock.total, per_device_train_batch_size=BATCH, learning_rate=1e-4,
            max_grad_norm=1.0, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
            optim="adamw_torch_fused", use_cpu=True, dataloader_pin_memory=False,
        ),
    ).train()  # fmt: skip


def lightning(clock: Clock) -> None:
    import logging

    import lightning
    import torch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model()

        def training_step(self, batch: Any, index: int) -> Any:
            total, weight = loss_of(self.model(input_ids=batch["input_ids"], use_cache=False), batch)
            self.log("loss", total / weight)
            return total / weight

        def on_train_batch_end(self, *_: Any) -> None:
            clock.step()

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.parameters())

    lightning.Trainer(
        max_steps=clock.total, accelerator="cpu", devices=1, gradient_clip_val=1.0, log_every_n_steps=1,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        logger=lightning.pytorch.loggers.CSVLogger("csv"),
    ).fit(Module(), torch.utils.data.DataLoader(rows(), batch_size=BATCH, shuffle=True))  # fmt: skip


def accelerate(clock: Clock) -> None:
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    made = model()
    made, optimizer, loader = accelerator.prepare(
        made, optimizer_of(made.parameters()),
        torch.utils.data.DataLoader(rows(), batch_size=BATCH, shuffle=True),
    )  # fmt: skip
    batches = _endless(loader)
    for _ in range(clock.total):
        with accelerator.accumulate(made):
            batch = next(batches)
            total, weight = loss_of(made(input_ids=batch["input_ids"], use_cache=False), batch)
            accelerator.backward(total / weight)
            accelerator.clip_grad_norm_(made.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            float(total / weight)
        clock.step()


PEERS: dict[str, Callable[[Clock], None]] = {
    "hf_trainer": hf_trainer, "lightning": lightning, "accelerate": accelerate,
}  # fmt: skip


class Clock:
    """Told of a peer's steps; after every so many it lets the hand-written loop make as many."""

    def __init__(self, hand: Chunk, rounds: int, steps: int) -> None:
        self.pairs: list[tuple[float, float]] = []
        self.total = (rounds + 1) * steps
        self._hand, self._steps, self._done = hand, steps, 0
        hand(5)
        self._begun = time.process_time()

    def step(self) -> None:
        self._done += 1
        if self._done % self._steps:
            return
        ended = time.process_time()
        self._hand(self._steps)
        if self._done > self._steps:  # the first ones warm up
            pair = (ended - self._begun, time.process_time() - ended)
            self.pairs.append((pair[0] / self._steps, pair[1] / self._steps))
        self._begun = time.process_time()


def images(who: str, workers: int, count: int) -> float:
    """Images a second through decoding and augmentation: our loader, or a DataLoader written by hand."""
    import torch
    from stoker.data.augment import IMAGENET, Augment
    from stoker.data.images import Images, read
    from stoker.data.loader import Loader
    from stoker.world import World

    torch.set_num_threads(1)
    source = read(str(Path(os.environ["STOKER_BENCH_IMAGES"])))
    dataset = Images(source, torch.arange(len(source.labels)).numpy(), Augment(64, *IMAGENET))
    if who == "ours":
        batches = Loader(dataset, batch_size=32, world=World(), seed=0, workers=workers).batches(0)
    elif who == "resumed":
        batches = Loader(dataset, batch_size=32, world=World(), seed=0, workers=workers).batches(10**9 + 7)
    else:

        class ByHand(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return len(dataset)

            def __getitem__(self, index: int) -> Any:
                return dataset.read(index, random.getrandbits(64))

        batches = _endless(
            torch.utils.data.DataLoader(
                ByHand(), 32, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
            )
        )
    for _ in range(16):  # both workers are at work
        next(batches)
    begun = time.perf_counter()
    for _ in range(count // 32):
        next(batches)
    return count / (time.perf_counter() - begun)


def first_batch(start: int) -> float:
    """Seconds until the first batch from a position, over a million samples; no workers."""
    import numpy as np
    from stoker.data.loader import Loader
    from stoker.world import World

    class Numbers:
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> Any:
            return np.float32(index)

    loader = Loader(Numbers(), batch_size=64, world=World(), seed=0)
    next(loader.batches(0))
    begun = time.perf_counter()
    next(loader.batches(start))
    return time.perf_counter() - begun


# -- the table --------------------------------------------------------------------------------


def loop_rows(quick: bool) -> list[Row]:
    rounds, steps = (4, 10) if quick else (20, 20)
    made = []
    for strategy, ranks in {"single": 1, **STRATEGIES}.items():
        found = harness.measure(HERE, "pairs", strategy=strategy, ranks=ranks, rounds=rounds, steps=steps)
        name = f"{strategy}, {ranks} rank{'s' * (ranks > 1)}: CPU time a step over one by hand"
        made.append(_row(name, found, "≤ 1.03×", lambda ratio: ratio <= 1.03))
    ours = made[0].ratio
    assert ours is not None
    for name in PEERS:
        found = harness.measure(HERE, "peer", name=name, rounds=rounds, steps=steps)
        made.append(_row(f"{name}, 1 rank: the same", found, "behind ours", lambda ratio: ratio > ours))
    return made


def _row(name: str, found: list[tuple[float, float]], goal: str, met: Callable[[float], bool]) -> Row:
    ratios = [mine / hand for mine, hand in found]
    return Row(
        name, "ms", 1e3 * median([mine for mine, _ in found]),
        {"by hand": 1e3 * median([hand for _, hand in found])}, median(ratios), spread(ratios), goal,
        met(median(ratios)),
    )  # fmt: skip


def image_rows(quick: bool) -> list[Row]:
    rounds, count = (2, 640) if quick else (9, 6400)
    with tempfile.TemporaryDirectory() as folder:
        _make_images(Path(folder), 8192)
        os.environ["STOKER_BENCH_IMAGES"] = folder
        mine, hand, resumed = [], [], []
        for _ in range(rounds):
            for who, held in (("ours", mine), ("by hand", hand), ("resumed", resumed)):
                held.append(harness.measure(HERE, "images", who=who, workers=2, count=count))
    ratios = [a / b for a, b in zip(mine, hand, strict=True)]
    middle = [a / b for a, b in zip(resumed, mine, strict=True)]
    starts = [harness.measure(HERE, "first_batch", start=s) for s in (0, 500_000_000_500)]
    return [
        Row("images through decoding and augmentation, 2 workers", "images/s", median(mine),
            {"DataLoader by hand": median(hand)}, median(ratios), spread(ratios), "≥ 1×",
            median(ratios) >= 1.0),
        Row("the same from the middle of an epoch", "images/s", median(resumed),
            {"from the start": median(mine)}, median(middle), spread(middle), "same", median(middle) >= 0.95),
        Row("first batch from sample 500,000,000,500", "ms", 1e3 * starts[1],
            {"from sample 0": 1e3 * starts[0]}, starts[1] / starts[0], None, "same",
            starts[1] <= 2 * starts[0] + 1e-3),
    ]  # fmt: skip


def _make_images(folder: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    drawn = np.random.default_rng(0)
    for number in range(count):
        file = folder / str(number % 10) / f"{number}.jpg"
        file.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(drawn.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        coarse.resize((256, 192), Image.Resampling.BICUBIC).save(file, quality=90)


def main() -> None:
    asked = harness.arguments(__doc__ or "")
    os.environ.update(harness.KEEP_MEMORY)
    made: list[Row] = []
    for part in (loop_rows, image_rows):
        began = time.perf_counter()
        made += part(asked.quick)
        print(f"{part.__name__}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    harness.report(made, asked.json)


if __name__ == "__main__":
    if not harness.answer_measure(
        {"pairs": pairs, "peer": peer, "images": images, "first_batch": first_batch}
    ):
        main()
