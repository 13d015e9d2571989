"""Which of the settings exclude each other, or do not work on a number of ranks.

This module does not import torch: mistakes that can be found without it are reported before any
process is started.
"""

from __future__ import annotations

from stoker.engine import deepspeed_file
from stoker.engine.settings import Ddp, DeepSpeed, Fsdp, Pipeline, Training
from stoker.errors import BadInput, BadWorldSize
from stoker.words import counted


def check(training: Training, *, ranks: int, gpus: int, batch_size: int | None = None) -> None:
    """Refuse settings that cannot work on this number of ranks, as far as is known without the model.

    Args:
        ranks: processes of the run, over all machines.
        gpus: GPUs of this machine.
        batch_size: samples per global batch, if known.

    Raises:
        BadWorldSize: a different number of ranks would work.
        BadInput: no number of ranks would work. Both errors say what to change.
    """
    if training.backend == "nccl" and gpus == 0:
        raise BadInput("backend=nccl: this machine has no GPU; use backend=auto or gloo")
    if training.sync_batchnorm and gpus == 0:
        raise BadInput("sync_batchnorm=true works on GPUs only, and this machine has none; omit it")
    if training.fsdp.offload and gpus == 0:
        raise BadInput("fsdp.offload=true: this machine has no GPU to offload from; omit it")
    if training.parallel == "single" and ranks > 1:
        raise BadWorldSize(f"parallel=single runs one process, not {ranks}: use parallel=ddp, or --nproc 1")
    if training.optimizer_in_backward:
        _check_in_backward(training, ranks)
    if training.parallel in ("fsdp", "auto"):
        _divides("fsdp.shard", training.fsdp.shard, ranks)
    if training.parallel == "pipeline":
        _check_pipeline(training, ranks)
    if training.parallel == "deepspeed":
        deepspeed_file.check(training)
    if batch_size is not None:
        shares = data_ranks(training, ranks)
        check_batch(batch_size, shares)
        if training.parallel == "pipeline":
            check_pipeline_batch(training, batch_size // shares, ranks // shares)


def _check_in_backward(training: Training, ranks: int) -> None:
    """Raises BadInput for settings that need all gradients before any weight is updated."""
    excluded = {
        f"{ranks} ranks": ranks > 1,
        f"parallel={training.parallel}": training.parallel not in ("auto", "single"),
        f"clip_norm={training.clip_norm}": training.clip_norm is not None,
        f"micro_batch={training.micro_batch}": training.micro_batch is not None,
        "precision=fp16": training.precision == "fp16",
        f"on_bad_loss={training.on_bad_loss}": training.on_bad_loss != "stop",
        "spike": training.spike is not None,
    }
    found = [what for what, is_so in excluded.items() if is_so]
    if found:
        kind = BadWorldSize if found == [f"{ranks} ranks"] else BadInput
        raise kind(
            "optimizer_in_backward=true updates each weight immediately, so it cannot be combined with "
            f"{', '.join(found)}. Set clip_norm=none, leave the others at their defaults, and run one process"
        )


def unused(training: Training, strategy: str) -> list[str]:
    """Groups of keys that were set but have no effect under this strategy, such as `fsdp`."""
    several = strategy == "pipeline" and training.pipeline.ranks is not None
    used = {strategy, *([training.pipeline.data] if several else [])}
    if strategy == "single":
        used = {"ddp", "fsdp", "deepspeed"}  # may be a one-process debugging run of a multi-rank config
    groups = {"ddp": Ddp(), "fsdp": Fsdp(), "pipeline": Pipeline(), "deepspeed": DeepSpeed()}
    return [n for n, default in groups.items() if n not in used and getattr(training, n) != default]


def data_ranks(training: Training, ranks: int) -> int:
    """The number of shares a global batch is divided into."""
    if training.parallel == "pipeline":
        return ranks // (training.pipeline.ranks or ranks)
    return ranks


def check_batch(batch_size: int, shares: int) -> None:
    """Raises BadWorldSize if a global batch cannot be divided evenly, naming the nearest sizes that can."""
    if batch_size < 1:
        raise BadInput(f"batch_size={batch_size}: must be at least 1")
    if batch_size % shares:
        below = batch_size // shares * shares
        near = f"{below} or {below + shares}" if below else str(shares)
        raise BadWorldSize(
            f"batch_size={batch_size} is global and cannot be divided evenly among {shares} data-parallel "
            f"ranks: the nearest size that can is {near}"
        )


def _check_pipeline(training: Training, ranks: int) -> None:
    if ranks < 2:
        raise BadWorldSize("parallel=pipeline needs at least two ranks: add --nproc 2")
    _divides("pipeline.ranks", training.pipeline.ranks, ranks, least=2)


def pipeline_micro_batches(schedule: str, share: int, ranks: int) -> list[int]:
    """The micro-batch sizes that a pipeline with this many ranks accepts, smallest first.

    All micro-batches have the same size, and the schedule restricts their number: 1F1B needs at
    least one per rank, interleaved 1F1B needs rounds of equal length.
    """
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    if schedule == "1f1b":
        return [n for n in sizes if share // n >= ranks]
    if schedule == "interleaved":
        return [n for n in sizes if share // n % max(1, share // n // ranks) == 0]
    return sizes


def check_pipeline_batch(training: Training, share: int, ranks: int) -> None:
    """Raises BadWorldSize if a pipeline's share of a batch cannot be split into micro-batches.

    Args:
        share: samples of a global batch that one pipeline processes.
        ranks: ranks of one pipeline.
    """
    schedule, micro = training.pipeline.schedule, training.micro_batch
    fitting = pipeline_micro_batches(schedule, share, ranks)
    if not fitting:
        raise BadWorldSize(
            f"a batch of {counted(share, 'sample')} is too small for a pipeline of {ranks} ranks with the "
            f"{schedule} schedule, which needs at least {ranks} micro-batches: increase batch_size, or "
            "use pipeline.schedule=gpipe"
        )
    if isinstance(micro, int) and micro not in fitting:
        raise BadWorldSize(
            f"micro_batch={micro} does not split the {counted(share, 'sample')} of a pipeline into equal "
            f"micro-batches, as many as the {schedule} schedule needs on {ranks} ranks: use one of "
            f"{', '.join(map(str, fitting))}"
        )


def _divides(key: str, part: int | None, ranks: int, least: int = 1) -> None:
    if part is not None and (part > ranks or ranks % part):
        fitting = ", ".join(str(n) for n in range(least, ranks + 1) if ranks % n == 0)
        raise BadWorldSize(f"{key}={part} does not divide the {ranks} ranks evenly: use one of {fitting}")
