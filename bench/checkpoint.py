"""What checkpoints cost, and how soon a training that was killed goes on.

python bench/checkpoint.py [--quick] [--json FILE]

State of 1 GB: a Llama of 83 million parameters and AdamW's two moments. Files go to the folder for
temporary files (TMPDIR).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import psutil
from harness import Row, median, spread

HERE = Path(__file__).resolve()


# -- 1 GB of state ------------------------------------------------------------------------------


def _model(quick: bool) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    layers = 1 if quick else 10
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
            num_attention_heads=12,
        )
    )  # fmt: skip


def _rows() -> Any:
    import torch

    ids = torch.arange(8).repeat(64, 1)
    return [{"input_ids": row, "labels": row} for row in ids]


def _state(model: Any, optimizer: Any) -> list[Any]:
    import torch

    held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return [p.detach() for p in model.parameters()] + held


def stopped(quick: bool, rounds: int) -> dict[str, Any]:
    """Seconds that our checkpoint stops the loop, beside a plain copy; until it is on disk, beside dd."""
    import stoker
    import torch
    from stoker.checkpoint import manifest

    warnings.simplefilter("ignore")
    run = stoker.Run("bench", "ours")
    trainer = stoker.Trainer(
        run, _model(quick), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4),
        inputs=lambda b: {"input_ids": b["input_ids"], "use_cache": False},
        loss=lambda out, b: (out.logits.float().logsumexp(-1).sum(), b["input_ids"].numel()),
        training=stoker.Training(precision="fp32", checkpoint_every="10h"),
    )  # fmt: skip
    batches = trainer.steps(trainer.loader(_rows(), batch_size=1), max_steps=10**6)
    found: dict[str, Any] = {"stop": [], "copy": [], "disk": [], "dd": []}
    trainer.step(next(batches))
    state = _state(trainer.model, trainer.optimizer)
    buffers = [torch.empty_like(t) for t in state]
    for buffer, tensor in zip(buffers, state, strict=True):
        buffer.copy_(tensor)
    for number in range(rounds + 1):
        trainer.step(next(batches))
        begun = time.perf_counter()
        for buffer, tensor in zip(buffers, state, strict=True):
            buffer.copy_(tensor)
        copied = time.perf_counter() - begun
        begun = time.perf_counter()
        trainer._save()
        stop = time.perf_counter() - begun
        trainer._checkpoints.wait()
        written = time.perf_counter() - begun
        size = manifest.newest(run.directory.checkpoints)[0].bytes  # type: ignore[union-attr]
        dd = _dd(run.directory.path, size)
        if number:  # the first one takes the memory for the copies
            for name, value in (("stop", stop), ("copy", copied), ("disk", written), ("dd", dd)):
                found[name].append(value)
    found["bytes"] = size
    return found


def resumed(folder: str, quick: bool, cold: bool) -> dict[str, float]:
    """Train one step more of a run; seconds that its Trainer waited for the checksums, and that it loaded."""
    import stoker
    import torch
    from stoker.checkpoint import store

    warnings.simplefilter("ignore")
    if cold:
        for checkpoint in Path(folder).glob("bench/resumed/checkpoints/step-*"):
            _forget(checkpoint)
    run = stoker.Run("bench", "resumed", runs=folder)
    model = _model(quick)
    found = {"waited": 0.0, "loaded": 0.0}
    run.attempt.newest_checkpoint = _timed(run.attempt.newest_checkpoint, found, "waited")  # type: ignore[method-assign]
    store.load_tensors = _timed(store.load_tensors, found, "loaded")
    with run:
        trainer = stoker.Trainer(
            run, model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4),
            inputs=lambda b: {"input_ids": b["input_ids"], "use_cache": False},
            loss=lambda out, b: (out.logits.float().logsumexp(-1).sum(), b["input_ids"].numel()),
            training=stoker.Training(precision="fp32", keep_checkpoints=1),
        )  # fmt: skip
        for batch in trainer.steps(trainer.loader(_rows(), batch_size=1), max_steps=run.step + 1):
            trainer.step(batch)
    return found


def _timed(call: Callable[..., Any], found: dict[str, float], name: str) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            found[name] += time.perf_counter() - begun

    return called


def _forget(folder: Path) -> None:
    """Have the kernel forget a folder's files, so that they are read from the disk again."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _dd(folder: Path, size: int) -> float:
    file = folder / "dd"
    begun = time.perf_counter()
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={file}", "bs=4M", f"count={size // 2**22}", "conv=fsync"],
        check=True, capture_output=True,
    )  # fmt: skip
    taken = time.perf_counter() - begun
    file.unlink()
    return taken


def peer(name: str, quick: bool, rounds: int) -> list[float]:
    """Seconds that a peer's checkpoint of the same state stops the loop."""
    import torch

    warnings.simplefilter("ignore")
    model = _model(quick)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    row = _rows()[0]["input_ids"][None]
    model(input_ids=row).logits.float().logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with contextlib.ExitStack() as stack:
        save = PEERS[name](model, optimizer, stack)
        taken = []
        for number in range(rounds + 1):
            folder = Path(f"step-{number}")
            begun = time.perf_counter()
            finish = save(folder)
            taken.append(time.perf_counter() - begun)
            finish()
            shutil.rmtree(folder, ignore_errors=True)
    return taken[1:]


def _nothing() -> None:
    pass


def _torch_save(model: Any, optimizer: Any, stack: contextlib.ExitStack) -> Callable[[Path], Any]:
    import torch

    def save(folder: Path) -> Callable[[], None]:
        folder.mkdir()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "all.pt")
        return _nothing

    return save


def _dcp_state(model: Any, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _dcp_save(model: Any, optimizer: Any, stack: contextlib.ExitStack) -> Callable[[Path], Any]:
    import torch.distributed.checkpoint as dcp

    def save(folder: Path) -> Callable[[], None]:
        dcp.save(_dcp_state(model, optimizer), checkpoint_id=str(folder), no_dist=True)
        return _nothing

    return save


def _dcp_async(model: Any, optimizer: Any, stack: contextlib.ExitStack) -> Callable[[Path], Any]:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    dist.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    stack.callback(dist.destroy_process_group)

    def save(folder: Path) -> Any:
        return dcp.async_save(_dcp_state(model, optimizer), checkpoint_id=str(folder)).result

    return save


def _hf_trainer(model: Any, optimizer: Any, stack: contextlib.ExitStack) -> Callable[[Path], Any]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=".", report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=_rows(), optimizers=(optimizer, None))
    trainer.create_scheduler(10, optimizer)

    def save(folder: Path) -> Callable[[], None]:
        trainer.state.global_step += 1
        trainer._save_checkpoint(model, trial=None)
        return lambda: shutil.rmtree(f"checkpoint-{trainer.state.global_step}")

    return save


PEERS = {
    "torch.save": _torch_save,
    "dcp.save": _dcp_save,
    "dcp.async_save": _dcp_async,
    "HF Trainer": _hf_trainer,
}


# -- steps beside checkpoints -------------------------------------------------------------------


def pace(rounds: int) -> list[tuple[float, float]]:
    """Seconds of 20 steps of a small model, with a checkpoint among them and without, in turn."""
    import stoker
    from stoker.duration import Duration

    import engine

    warnings.simplefilter("ignore")

    def loop(name: str, every: str) -> Callable[[], float]:
        run = stoker.Run("bench", name)
        trainer = stoker.Trainer(
            run, engine.model(), optimizer=engine.optimizer_of, loss=engine.loss_of,
            inputs=lambda b: {"input_ids": b["input_ids"], "use_cache": False},
            training=stoker.Training(precision="fp32", checkpoint_every=Duration.parse(every)),
        )  # fmt: skip
        batches: Iterator[Any] = trainer.steps(
            trainer.loader(engine.rows(), batch_size=engine.BATCH), max_steps=10**6
        )

        def steps() -> float:
            begun = time.perf_counter()
            for _ in range(20):
                run.log(loss=trainer.step(next(batches)))
            return time.perf_counter() - begun

        return steps

    with_checkpoints, without = loop("with", "20"), loop("without", "10h")
    found = []
    for number in range(rounds + 2):
        order = (with_checkpoints, without) if number % 2 else (without, with_checkpoints)
        taken = {part: part() for part in order}
        found.append((taken[with_checkpoints], taken[without]))
    return found[2:]


# -- restarts -----------------------------------------------------------------------------------


def ours_killed(kills: int, workers: int = 0) -> dict[str, Any]:
    """Seconds from SIGKILL of a rank to the next step in the journal, and the bytes of a checkpoint."""
    recipe = HERE.parent / "soak.py"
    command = [
        sys.executable, "-m", "stoker", "train", str(recipe), "precision=fp32", "steps=1000000",
        "checkpoint_every=20", "pause=0.01", f"workers={workers}", "--nproc", "2",
        "--name", "a", "--experiment", "bench", "--max-restarts", "9",
    ]  # fmt: skip
    with Path("log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    journal = Path("runs/bench/a/journal")
    taken = []
    try:
        for number in range(1, kills + 1):
            _until(lambda n=number: _steps(journal / f"attempt-{n:04}.rank-0.jsonl") >= 40, process, 60)
            ranks = _ranks_of(process.pid)
            begun = time.monotonic()
            os.kill(ranks[number % 2], signal.SIGKILL)
            _until(lambda n=number: _steps(journal / f"attempt-{n + 1:04}.rank-0.jsonl") >= 1, process, 60)
            taken.append(time.monotonic() - begun)
        sizes = [
            sum(f.stat().st_size for f in p.iterdir()) for p in Path("runs/bench/a/checkpoints").iterdir()
        ]
    finally:
        process.kill()
    return {"seconds": taken, "bytes": max(sizes)}


def torchrun_killed(kills: int, patience: float) -> list[float | None]:
    """The same by torchrun and a script; None where it did not go on within `patience` seconds."""
    return [_torchrun_killed(Path(f"torchrun-{n}"), n % 2, patience) for n in range(kills)]


def _torchrun_killed(folder: Path, rank: int, patience: float) -> float | None:
    folder.mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "3", "--monitor-interval", "0.05", str(HERE), "--torchrun-worker",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )

    def goes_on() -> bool:
        return any(_lines(folder / f"steps-{restart}") >= 1 for restart in (1, 2, 3))

    try:
        _until(lambda: _lines(folder / "steps-0") >= 40, process, 60)
        begun = time.monotonic()
        os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)
        with contextlib.suppress(TimeoutError, RuntimeError):  # it hangs, or gives up
            _until(goes_on, process, patience)
        return time.monotonic() - begun if goes_on() else None
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for worker in psutil.Process(process.pid).children(recursive=True):
                worker.kill()
        process.kill()
        process.wait()


def torchrun_worker() -> None:
    """DDP on a small network, with a checkpoint by torch.save every 20 steps, resumed from."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    Path(f"pid-{rank}").write_text(str(os.getpid()))
    model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if Path("state.pt").exists():
        state = torch.load("state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    called = DistributedDataParallel(model)
    for step in range(1_000_000):
        called(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            with Path(f"steps-{attempt}").open("a") as file:
                file.write(f"{step}\n")
            if step % 20 == 19:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "state.part")
                Path("state.part").rename("state.pt")
        time.sleep(0.01)


def _until(yes: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not yes():
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode}")
        if time.monotonic() > until:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.002)


def _steps(journal: Path) -> int:
    return journal.read_bytes().count(b'"loss"') if journal.exists() else 0


def _lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def _ranks_of(launcher: int) -> dict[int, int]:
    children = {child.pid for child in psutil.Process(launcher).children(recursive=True)}
    files = Path(tempfile.gettempdir()).glob("stoker-launch-*/rank-*.pid")
    pids = [(int(f.stem.removeprefix("rank-")), int(f.read_text())) for f in files]
    return {rank: pid for rank, pid in pids if pid in children}


# -- resuming within an epoch -------------------------------------------------------------------


def first_step(start: int) -> float:
    """Seconds from asking for batches to having the first one, of an epoch of 10,000,000 samples."""
    from stoker.data.loader import Loader
    from stoker.world import World

    class Samples:
        def __len__(self) -> int:
            return 10_000_000

        def __getitem__(self, index: int) -> int:
            return index

    loader = Loader(Samples(), batch_size=64, world=World(), seed=0)
    next(loader.batches(0))
    taken = []
    for _ in range(50):
        begun = time.perf_counter()
        next(loader.batches(start))
        taken.append(time.perf_counter() - begun)
    return median(taken)


# -- rows ---------------------------------------------------------------------------------------


def state_rows(quick: bool) -> list[Row]:
    rounds = 2 if quick else 7
    found = harness.measure(HERE, "stopped", quick=quick, rounds=rounds)
    peers = {
        f"{name}, s": median(harness.measure(HERE, "peer", name=name, quick=quick, rounds=2))
        for name in PEERS
    }
    size = found["bytes"]
    gigabytes = f"{size / 1e9:.2f} GB"
    stop = [a / b for a, b in zip(found["stop"], found["copy"], strict=True)]
    disk = [b / a for a, b in zip(found["disk"], found["dd"], strict=True)]
    return [
        Row(f"the loop is stopped by a checkpoint of {gigabytes}, times a plain copy", "s",
            median(found["stop"]), {"copy, s": median(found["copy"]), **peers}, median(stop), spread(stop),
            "≤ 1.5×", median(stop) <= 1.5),
        Row(f"bytes a second to disk, {gigabytes}, over dd with fsync", "MB/s",
            size / 1e6 / median(found["disk"]), {"dd": size / 1e6 / median(found["dd"])}, median(disk),
            spread(disk), "≥ 0.8", median(disk) >= 0.8),
        *verifying_rows(quick, gigabytes),
    ]  # fmt: skip


def verifying_rows(quick: bool, gigabytes: str) -> list[Row]:
    """Of a resume as it happens: what it waits for the checksums, beside its load."""
    rows = []
    for cold in (False, True):
        with tempfile.TemporaryDirectory(prefix="stoker-bench-runs-") as folder:
            options = {"folder": folder, "quick": quick, "cold": cold}
            harness.measure(HERE, "resumed", **options)  # makes the checkpoint
            found = [harness.measure(HERE, "resumed", **options) for _ in range(2 if quick else 7)]
        ratios = [one["waited"] / one["loaded"] for one in found]
        where = "the disk" if cold else "the page cache"
        rows.append(
            Row(f"a resume waits for the checksums of {gigabytes} from {where}, over loading it", "s",
                median([one["waited"] for one in found]),
                {"loading, s": median([one["loaded"] for one in found])}, median(ratios), spread(ratios),
                "≤ 0.1", median(ratios) <= 0.1)
        )  # fmt: skip
    return rows


def pace_rows(quick: bool) -> list[Row]:
    found = harness.measure(HERE, "pace", rounds=4 if quick else 24)
    ratios = [without / with_ for with_, without in found]
    return [
        Row("steps/s with a checkpoint every 20 over steps/s with none, steps of 90 ms", "steps/s",
            20 / median([with_ for with_, _ in found]), {"none": 20 / median([none for _, none in found])},
            median(ratios), spread(ratios), "≥ 0.95", median(ratios) >= 0.95),
    ]  # fmt: skip


def restart_rows(quick: bool) -> list[Row]:
    kills = 5 if quick else 30
    found = harness.measure(HERE, "ours_killed", kills=kills)
    theirs = harness.measure(HERE, "torchrun_killed", kills=2 if quick else 10, patience=30.0)
    recovered = [seconds for seconds in theirs if seconds is not None]
    taken = found["seconds"]
    peers = {f"torchrun recovered of {len(theirs)}": float(len(recovered))}
    if recovered:
        peers |= {"its median, s": median(recovered), "its worst, s": max(recovered)}
    return [
        Row(f"from the kill of a rank to the next step, 2 ranks, {kills} kills, all recovered; "
            f"69 thousand parameters, {found['bytes'] / 1e6:.1f} MB a checkpoint", "s", median(taken), peers,
            None, spread(taken), "median ≤ 0.6, worst ≤ 2", median(taken) <= 0.6 and max(taken) <= 2),
    ]  # fmt: skip


def resume_rows(quick: bool) -> list[Row]:
    pairs = [
        (harness.measure(HERE, "first_step", start=5_000_000), harness.measure(HERE, "first_step", start=0))
        for _ in range(2 if quick else 5)
    ]
    ratios = [middle / start for middle, start in pairs]
    return [
        Row("first batch from the middle of an epoch of 10,000,000 samples over from its start", "ms",
            1e3 * median([middle for middle, _ in pairs]), {"start": 1e3 * median([s for _, s in pairs])},
            median(ratios), spread(ratios), "≤ 1.05", median(ratios) <= 1.05),
    ]  # fmt: skip


def main() -> None:
    asked = harness.arguments(__doc__ or "")
    made: list[Row] = []
    for part in (state_rows, pace_rows, restart_rows, resume_rows):
        began = time.perf_counter()
        made += part(asked.quick)
        print(f"{part.__name__}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    harness.report(made, asked.json)


MEASURES = {
    "stopped": stopped, "peer": peer, "pace": pace, "ours_killed": ours_killed,
    "torchrun_killed": torchrun_killed, "first_step": first_step, "resumed": resumed,
}  # fmt: skip

if __name__ == "__main__":
    if "--torchrun-worker" in sys.argv:
        torchrun_worker()
    elif not harness.answer_measure(MEASURES):
        main()
