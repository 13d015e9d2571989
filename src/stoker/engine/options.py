"""How a run uses its devices: the keys that every recipe shares, and what of them excludes what.

A recipe's config inherits from `Training`, so that `parallel=fsdp precision=bf16` mean the same
everywhere. They change how fast a run is and what fits, not what it computes. No torch here: a
mistake that can be seen without it is answered before any process is started.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from stoker.duration import Duration
from stoker.errors import BadInput, BadWorldSize
from stoker.words import counted

Strategy = Literal["auto", "single", "ddp", "fsdp", "pipeline", "deepspeed"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Backend = Literal["auto", "gloo", "nccl"]


@dataclass(frozen=True, kw_only=True)
class Ddp:
    """parallel=ddp: torch's DistributedDataParallel."""

    bucket_mb: Annotated[float, Gt(0)] = 25.0
    """Gradients are reduced in buckets of so many MiB, while the backward pass goes on."""
    gradient_as_bucket_view: bool = True
    """Gradients live in the buckets: no copy, and memory for one."""
    static_graph: bool = False
    """The same parameters are used at every step; lets DDP reorder its work."""
    find_unused_parameters: bool = False
    """Some steps leave parameters without a gradient; costs a walk over the graph each step."""


@dataclass(frozen=True, kw_only=True)
class Fsdp:
    """parallel=fsdp: torch's FSDP2, parameters, gradients and optimizer state sharded by block."""

    shard: Annotated[int, Ge(1)] | None = None
    """Ranks that share one copy of the model; by default all. Fewer: hybrid sharding, one copy each."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass and gather them again for the backward."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory; GPU only."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """parallel=pipeline: the blocks are cut into stages, micro-batches stream through them."""

    ranks: Annotated[int, Ge(2)] | None = None
    """Ranks one pipeline runs over; by default all. Fewer: several pipelines, data parallel."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """gpipe (all forward, then all backward), 1f1b (less memory), interleaved (smaller bubble)."""
    stages_per_rank: Annotated[int, Ge(2)] = 2
    """Stages a rank holds under the interleaved schedule."""
    data: Literal["ddp", "fsdp"] = "ddp"
    """How several pipelines share their gradients."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeed:
    """parallel=deepspeed: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054); extra `deepspeed`."""

    stage: Annotated[int, Ge(0), Lt(4)] | None = None
    """ZeRO stage: 1 shards optimizer state, 2 gradients too, 3 parameters too; 2 where none is given."""
    offload_optimizer: bool = False
    """Keep the optimizer's state, and its step, in host memory."""
    offload_parameters: bool = False
    """Keep parameters in host memory (stage 3)."""
    config: Path | None = None
    """An existing DeepSpeed JSON file. What it sets must not be set here as well; "auto" leaves it to us."""


@dataclass(frozen=True, kw_only=True)
class Ema:
    """A moving average of the weights, which evaluation and export then use."""

    decay: Annotated[float, Gt(0), Lt(1)] | None = None
    """Share of the average that stays at a step, such as 0.999; none: no average."""
    warmup: bool = True
    """Begin with a smaller decay, (1 + step) / (10 + step), so that the start is soon forgotten."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every recipe has. Inherit a config from it, and hand that to `Trainer`."""

    parallel: Strategy = "auto"
    """single, ddp, fsdp, pipeline, deepspeed; auto picks by ranks, model size and memory, and says why."""
    ddp: Ddp = field(default_factory=Ddp)
    fsdp: Fsdp = field(default_factory=Fsdp)
    pipeline: Pipeline = field(default_factory=Pipeline)
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    backend: Backend = "auto"
    """What ranks talk through: nccl between GPUs, gloo between CPUs."""
    precision: Precision = "auto"
    """fp32, bf16, fp16 (with dynamic loss scaling); auto: bf16 where the device is fast at it."""
    tf32: bool = False
    """Let float32 products on NVIDIA GPUs round to TF32 (10 bits of mantissa); several times faster."""
    deterministic: bool = False
    """Only operations that give the same bits each time, so that a run gives them when it is killed and
    resumed, or done again; slower on GPUs. An operation with no such form is an error that says where."""
    micro_batch: Annotated[int, Ge(1)] | Literal["auto"] | None = None
    """Samples a rank takes in one forward pass; auto finds the largest that fits; none: all of its share."""
    activation_checkpointing: str = "none"
    """none, full (every block), selective (keep products, recompute the rest), or N: every n-th block."""
    compile: bool = False
    """Compile each block with torch.compile."""
    blocks: tuple[str, ...] = ()
    """Class names of the repeated blocks that are sharded, recomputed and compiled; by default found."""
    data_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Train on this share of the samples, the same ones for a seed; those of a smaller share are among those
    of a larger one."""
    clip_norm: Annotated[float, Gt(0)] | None = None
    """Largest global L2 norm of the gradient; larger ones are scaled down to it."""
    optimizer_in_backward: bool = False
    """Step each weight as soon as its gradient is there, so that these never stand in memory together. One
    process, no accumulation, and clip_norm=none."""
    ema: Ema = field(default_factory=Ema)
    channels_last: bool = False
    """Keep image batches and convolutions channels last in memory; faster on GPUs."""
    sync_batchnorm: bool = False
    """BatchNorm's statistics over all ranks; GPU only."""
    checkpoint_every: Duration = Duration(10, "minute")
    """How much training a kill can cost; 10min, 500, 1ep. The result does not depend on it."""
    checkpoint_best: bool | None = None
    """Take one as well whenever the metric that the best goes by (val_loss) is better than ever, of the very
    weights that were measured; else the best is one of those that are taken anyway. none: with patience."""
    keep_checkpoints: Annotated[int, Ge(1)] = 3
    """How many of the newest checkpoints are kept; the best is kept as well."""
    keep_every: Annotated[int, Ge(1)] | None = None
    """Keep for good the checkpoints of steps that this divides, such as 1000; none: no others are kept."""
    on_bad_loss: Literal["stop", "skip", "rewind"] = "stop"
    """Where a loss or gradient is not finite: stop, skip the batch, or rewind the weights to the newest
    checkpoint and go on behind the batch."""
    spike: Annotated[float, Gt(1)] | None = None
    """A loss of so many times its running median (of 100 steps) is bad as well; none: only one not finite."""
    hang_limit: Duration | None = None
    """What does no step for so long is ended, with its stacks, such as 10min; by default 20 times the longest
    step so far, and at least 5 minutes. Under --max-restarts it is started again."""

    def __post_init__(self) -> None:
        checkpointing(self.activation_checkpointing)
        object.__setattr__(self, "checkpoint_every", Duration.parse(self.checkpoint_every))
        if self.hang_limit is not None and self.hang_limit.seconds is None:
            raise ValueError(f"hang_limit={self.hang_limit}: give it by the clock, such as 10min")


def of_memory(training: Training) -> dict[str, str]:
    """The settings that change how much memory a step takes, in words."""
    names = (
        "ddp", "fsdp", "pipeline", "activation_checkpointing", "compile", "blocks", "ema", "channels_last",
        "sync_batchnorm",
    )  # fmt: skip
    return {name: str(getattr(training, name)) for name in names}


def checkpointing(text: str) -> tuple[str, int]:
    """What `activation_checkpointing` says: (none | full | selective, every how many blocks).

    Raises ValueError.
    """
    if text in ("none", "full", "selective"):
        return text, 1
    if text.isdecimal() and int(text) > 0:
        return "full", int(text)
    raise ValueError(
        f"activation_checkpointing={text}: give none, full, selective, or every how many blocks, such as 2"
    )


def check(training: Training, *, ranks: int, gpus: int, batch_size: int | None = None) -> None:
    """Refuse what cannot work on so many ranks, as far as it is known without the model.

    Args:
        ranks: processes of the run, over all machines.
        gpus: of this machine.
        batch_size: samples of a global batch, where it is known.

    Raises:
        BadWorldSize: another number of ranks could do it.
        BadInput: none could. Both say what to change.
    """
    if training.backend == "nccl" and gpus == 0:
        raise BadInput("backend=nccl: there is no GPU here; leave backend to auto, or give gloo")
    if training.sync_batchnorm and gpus == 0:
        raise BadInput("sync_batchnorm=true: torch has it on GPUs only, and there is none here; leave it out")
    if training.fsdp.offload and gpus == 0:
        raise BadInput("fsdp.offload=true: there is no GPU to offload from; leave it out")
    if training.parallel == "single" and ranks > 1:
        raise BadWorldSize(f"parallel=single is one process, and there are {ranks}: give ddp, or --nproc 1")
    if training.optimizer_in_backward:
        _check_in_backward(training, ranks)
    if training.parallel in ("fsdp", "auto"):
        _divides("fsdp.shard", training.fsdp.shard, ranks)
    if training.parallel == "pipeline":
        _check_pipeline(training, ranks)
    if training.parallel == "deepspeed":
        _check_deepspeed(training)
    if batch_size is not None:
        shares = data_ranks(training, ranks)
        check_batch(batch_size, shares)
        if training.parallel == "pipeline":
            check_pipeline_batch(training, batch_size // shares, ranks // shares)


def _check_in_backward(training: Training, ranks: int) -> None:
    """Raises BadInput for what needs all gradients before any weight moves."""
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
            f"optimizer_in_backward=true moves each weight at once: it does not go with {', '.join(found)}. "
            "Give clip_norm=none, leave the others at their defaults, and run one process"
        )


def unused(training: Training, strategy: str) -> list[str]:
    """Groups of keys that were set and mean nothing under this strategy, such as `fsdp`."""
    several = strategy == "pipeline" and training.pipeline.ranks is not None
    used = {strategy, *([training.pipeline.data] if several else [])}
    if strategy == "single":
        used = {"ddp", "fsdp", "deepspeed"}  # a debugging run of what is meant for several ranks
    groups = {"ddp": Ddp(), "fsdp": Fsdp(), "pipeline": Pipeline(), "deepspeed": DeepSpeed()}
    return [n for n, default in groups.items() if n not in used and getattr(training, n) != default]


def data_ranks(training: Training, ranks: int) -> int:
    """Among how many shares a global batch is divided."""
    if training.parallel == "pipeline":
        return ranks // (training.pipeline.ranks or ranks)
    return ranks


def check_batch(batch_size: int, shares: int) -> None:
    """Raises BadWorldSize where a global batch cannot be divided, naming the nearest that can."""
    if batch_size < 1:
        raise BadInput(f"batch_size={batch_size}: it must be at least 1")
    if batch_size % shares:
        below = batch_size // shares * shares
        near = f"{below} or {below + shares}" if below else str(shares)
        raise BadWorldSize(
            f"batch_size={batch_size} is global, and cannot be divided among {shares} data-parallel ranks: "
            f"the nearest that can is {near}"
        )


def _check_pipeline(training: Training, ranks: int) -> None:
    if ranks < 2:
        raise BadWorldSize("parallel=pipeline needs two ranks or more: add --nproc 2")
    _divides("pipeline.ranks", training.pipeline.ranks, ranks, least=2)


def pipeline_micro_batches(schedule: str, share: int, ranks: int) -> list[int]:
    """The sizes of a micro-batch that a pipeline of so many ranks takes, smallest first.

    All micro-batches have one size, and their number is one that the schedule can do: 1F1B wants
    one a rank or more, interleaved 1F1B rounds of equal length.
    """
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    if schedule == "1f1b":
        return [n for n in sizes if share // n >= ranks]
    if schedule == "interleaved":
        return [n for n in sizes if share // n % max(1, share // n // ranks) == 0]
    return sizes


def check_pipeline_batch(training: Training, share: int, ranks: int) -> None:
    """Raises BadWorldSize where a pipeline's share of a batch cannot be cut into micro-batches.

    Args:
        share: samples of a global batch that one pipeline takes.
        ranks: of one pipeline.
    """
    schedule, micro = training.pipeline.schedule, training.micro_batch
    fitting = pipeline_micro_batches(schedule, share, ranks)
    if not fitting:
        raise BadWorldSize(
            f"a batch of {counted(share, 'sample')} is too small for a pipeline of {ranks} ranks and its "
            f"{schedule} schedule, which wants {ranks} micro-batches or more: make batch_size larger, or "
            "give pipeline.schedule=gpipe"
        )
    if isinstance(micro, int) and micro not in fitting:
        raise BadWorldSize(
            f"micro_batch={micro} does not cut the {counted(share, 'sample')} of a pipeline into "
            f"micro-batches of one size, as many as its {schedule} schedule wants over {ranks} ranks: give "
            f"one of {', '.join(map(str, fitting))}"
        )


def _check_deepspeed(training: Training) -> None:
    if training.micro_batch == "auto":
        raise BadInput("micro_batch=auto does not work with parallel=deepspeed: give a number")
    if importlib.util.find_spec("deepspeed") is None:
        raise BadInput("parallel=deepspeed needs deepspeed: pip install 'stoker[deepspeed]'")
    chosen = training.deepspeed
    stage = zero_stage(chosen)
    if chosen.offload_parameters and stage != 3:
        raise BadInput(f"deepspeed.offload_parameters is for stage 3, and the stage is {stage}")
    if chosen.offload_optimizer and stage == 0:
        raise BadInput("deepspeed.offload_optimizer is for stages 1, 2 and 3, and the stage is 0")


def _divides(key: str, part: int | None, ranks: int, least: int = 1) -> None:
    if part is not None and (part > ranks or ranks % part):
        fitting = ", ".join(str(n) for n in range(least, ranks + 1) if ranks % n == 0)
        raise BadWorldSize(f"{key}={part} does not divide the {ranks} ranks: give one of {fitting}")


def zero_stage(chosen: DeepSpeed) -> int:
    """The ZeRO stage: from the key, else from the file, else 2. Raises BadInput where both say one."""
    given = read_deepspeed(chosen.config).get("zero_optimization", {}).get("stage", "auto")
    if chosen.stage is not None and given not in ("auto", chosen.stage):
        raise BadInput(
            f"the ZeRO stage is set twice: deepspeed.stage={chosen.stage}, and {given} in {chosen.config}"
        )
    if chosen.stage is not None:
        return chosen.stage
    return 2 if given == "auto" else int(given)


def read_deepspeed(file: Path | None) -> dict[str, Any]:
    """A DeepSpeed JSON file; empty for none. Raises BadInput."""
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"deepspeed.config={file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"deepspeed.config={file} holds a {type(content).__name__}: it must be an object")
    for key, (fits, what) in _OF_DEEPSPEED.items():
        section, _, inner = key.rpartition(".")
        holder = content.get(section, {}) if section else content
        if inner in holder and holder[inner] != "auto" and not fits(holder[inner]):
            raise BadInput(f"{file}: {key} is {json.dumps(holder[inner])}; it must be {what}")
    return content


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_COUNT = (_is_count, "a whole number above 0")
_OBJECT = (_is_object, "an object")
_OF_DEEPSPEED: dict[str, tuple[Callable[[Any], bool], str]] = {  # sections before what is in them
    "zero_optimization": _OBJECT,
    "zero_optimization.stage": (lambda v: type(v) is int and 0 <= v <= 3, "0, 1, 2 or 3"),
    "bf16": _OBJECT,
    "fp16": _OBJECT,
    "bf16.enabled": (lambda v: isinstance(v, bool), "true or false"),
    "fp16.enabled": (lambda v: isinstance(v, bool), "true or false"),
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "gradient_clipping": (lambda v: type(v) in (int, float) and v >= 0, "a number, 0 for none"),
}


def with_deepspeed_file(training: Training) -> Training:
    """The settings with what a DeepSpeed JSON file says of clipping, micro-batch and precision.

    Raises BadInput where the file and the run set the same thing to different values.
    """
    if training.parallel != "deepspeed" or training.deepspeed.config is None:
        return training
    file = training.deepspeed.config
    given = read_deepspeed(file)
    for section in ("optimizer", "scheduler"):
        if section in given:
            raise BadInput(
                f"{file} sets the {section}, and so does the run: take the section out of the file"
            )
    half = [p for p in ("bf16", "fp16") if given.get(p, {}).get("enabled") is True]
    if len(half) > 1:
        raise BadInput(f"{file} enables both bf16 and fp16: leave one")
    clip_norm = given.get("gradient_clipping", "auto") or None  # 0 is DeepSpeed's word for none
    said: dict[str, tuple[str, Any, Any]] = {
        "clip_norm": ("gradient_clipping", clip_norm, training.clip_norm),
        "micro_batch": (
            "train_micro_batch_size_per_gpu",
            given.get("train_micro_batch_size_per_gpu", "auto"),
            training.micro_batch,
        ),
        "precision": ("its precision", half[0] if half else "auto", training.precision),
    }
    changes: dict[str, Any] = {}
    for key, (theirs, value, ours) in said.items():
        if value == "auto":
            continue
        if ours not in (None, "auto", value):
            same = f"{key}={'none' if value is None else value}"
            if key == "clip_norm" and value is not None:
                same += ", or clip_norm=none to leave it to the file"
            raise BadInput(
                f"set twice: {key}={ours}, and {theirs} to {value} in {file}; "
                f'give {same}, or "auto" in the file'
            )
        changes[key] = value
    return replace(training, **changes)


def check_deepspeed_batch(training: Training, *, batch_size: int, ranks: int, parts: int) -> None:
    """Raises BadInput where a DeepSpeed file has another batch size or accumulation than the run."""
    file = training.deepspeed.config
    if training.parallel != "deepspeed" or file is None:
        return
    given = read_deepspeed(file)
    for theirs, ours in (("train_batch_size", batch_size), ("gradient_accumulation_steps", parts)):
        value = given.get(theirs, "auto")
        if value not in ("auto", ours):
            raise BadInput(
                f"{file} sets {theirs} to {value}, and the run comes to {ours} on {ranks} ranks: "
                f'give "auto" in the file, or change batch_size or micro_batch'
            )
