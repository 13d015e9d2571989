"""The settings of how a run uses its devices: the config keys that all recipes share.

A recipe's config inherits from `Training`, so `parallel=fsdp precision=bf16` means the same
everywhere. These keys change how fast a run is and what fits into memory, not what it computes.
This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from stoker.duration import Duration

Strategy = Literal["auto", "single", "ddp", "fsdp", "pipeline", "deepspeed"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Backend = Literal["auto", "gloo", "nccl"]


@dataclass(frozen=True, kw_only=True)
class Ddp:
    """parallel=ddp: torch's DistributedDataParallel."""

    bucket_mb: Annotated[float, Gt(0)] = 25.0
    """Size in MiB of the buckets in which gradients are reduced during the backward pass."""
    gradient_as_bucket_view: bool = True
    """Keep gradients in the buckets themselves, which saves a copy of them in memory."""
    static_graph: bool = False
    """Declare that every step uses the same parameters, which lets DDP reorder its work."""
    find_unused_parameters: bool = False
    """Allow steps that leave some parameters without a gradient; traverses the graph at every step."""


@dataclass(frozen=True, kw_only=True)
class Fsdp:
    """parallel=fsdp: torch's FSDP2, parameters, gradients and optimizer state sharded by block."""

    shard: Annotated[int, Ge(1)] | None = None
    """Ranks that share one copy of the model; default: all. With fewer, each group of ranks holds its own
    copy (hybrid sharding)."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass and gather them again for the backward pass."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory; GPU only."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """parallel=pipeline: the blocks are split into stages, and micro-batches stream through them."""

    ranks: Annotated[int, Ge(2)] | None = None
    """Ranks per pipeline; default: all. With fewer, several pipelines run data-parallel."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """gpipe (all forward passes, then all backward passes), 1f1b (less memory), or interleaved (smaller
    bubble)."""
    stages_per_rank: Annotated[int, Ge(2)] = 2
    """Stages per rank under the interleaved schedule."""
    data: Literal["ddp", "fsdp"] = "ddp"
    """How gradients are combined across several pipelines."""

    @property
    def stages_of_a_rank(self) -> int:
        """The number of stages on each rank."""
        return self.stages_per_rank if self.schedule == "interleaved" else 1


@dataclass(frozen=True, kw_only=True)
class DeepSpeed:
    """parallel=deepspeed: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054); extra `deepspeed`."""

    stage: Annotated[int, Ge(0), Lt(4)] | None = None
    """ZeRO stage: 1 shards optimizer state, 2 also gradients, 3 also parameters; 2 if not set anywhere."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory, and run the optimizer step there."""
    offload_parameters: bool = False
    """Keep parameters in host memory (stage 3 only)."""
    config: Path | None = None
    """An existing DeepSpeed JSON file. It must not set a value differently from the run; "auto" in the file
    takes the run's value."""


@dataclass(frozen=True, kw_only=True)
class Ema:
    """An exponential moving average of the weights; evaluation and export use it."""

    decay: Annotated[float, Gt(0), Lt(1)] | None = None
    """Share of the average that is kept at each step, such as 0.999; none: no average."""
    warmup: bool = True
    """Start with a smaller decay, (1 + step) / (10 + step), so that the initial weights are soon
    forgotten."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The keys of every recipe. Inherit your config from this class and pass it to `Trainer`."""

    parallel: Strategy = "auto"
    """single, ddp, fsdp, pipeline or deepspeed; auto chooses by the number of ranks, model size and memory,
    and logs why."""
    ddp: Ddp = field(default_factory=Ddp)
    fsdp: Fsdp = field(default_factory=Fsdp)
    pipeline: Pipeline = field(default_factory=Pipeline)
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    backend: Backend = "auto"
    """Communication backend: nccl between GPUs, gloo between CPUs; auto chooses by device."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16 (with dynamic loss scaling); auto: bf16 if it is fast on this device."""
    tf32: bool = False
    """Let float32 matrix products on NVIDIA GPUs round to TF32 (10-bit mantissa); several times faster."""
    deterministic: bool = False
    """Use only deterministic operations, so that a run that is killed and resumed, or repeated, is
    bit-identical; slower on GPUs. An operation without a deterministic form is an error that says where it
    was called."""
    micro_batch: Annotated[int, Ge(1)] | Literal["auto"] | None = None
    """Samples per rank in one forward pass; auto finds the largest number that fits; none: the rank's whole
    share of the batch."""
    activation_checkpointing: str = "none"
    """none, full (every block), selective (keep matrix products, recompute the rest), or N (every Nth
    block)."""
    compile: bool = False
    """Compile each block with torch.compile."""
    blocks: tuple[str, ...] = ()
    """Class names of the repeated blocks that are sharded, recomputed and compiled; default: detected."""
    data_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Train on this share of the samples, chosen by the seed; a smaller share is a subset of a larger one."""
    clip_norm: Annotated[float, Gt(0)] | None = None
    """Maximum global L2 norm of the gradient; larger gradients are scaled down to it."""
    optimizer_in_backward: bool = False
    """Step each weight as soon as its gradient is computed, so that the gradients are never all in memory at
    once. Requires one process, no gradient accumulation, and clip_norm=none."""
    ema: Ema = field(default_factory=Ema)
    channels_last: bool = False
    """Use the channels-last memory format for image batches and convolutions; faster on GPUs."""
    sync_batchnorm: bool = False
    """Compute BatchNorm statistics over all ranks; GPU only."""
    checkpoint_every: Duration = Duration(10, "minute")
    """How often to save a checkpoint, which is the most training that a kill can cost: 10min, 500 (steps),
    1ep. The result does not depend on it."""
    checkpoint_best: bool | None = None
    """Also save a checkpoint whenever the metric that decides the best one improves, with exactly the weights
    that were evaluated. If false, the best is chosen among the regular checkpoints. none: true if
    patience is set."""
    keep_checkpoints: Annotated[int, Ge(1)] = 3
    """How many of the newest checkpoints to keep; the best one is kept as well."""
    keep_every: Annotated[int, Ge(1)] | None = None
    """Also keep every checkpoint whose step is a multiple of this, such as 1000; none: keep no others."""
    on_bad_loss: Literal["stop", "skip", "rewind"] = "stop"
    """What to do if a loss or gradient is not finite: stop, skip the batch, or rewind the weights to the
    newest checkpoint and continue after the batch."""
    spike: Annotated[float, Gt(1)] | None = None
    """Also treat a loss as bad if it is this many times its running median (over 100 steps); none: only a
    non-finite loss is bad. A model with several optimizers has several losses, of which only that counts."""
    hang_limit: Duration | None = None
    """End the run and write its stacks if no step completes for this long, such as 10min; default: 20 times
    the longest step so far, and at least 5 minutes. With --max-restarts the run is started again."""

    def __post_init__(self) -> None:
        checkpointing(self.activation_checkpointing)
        object.__setattr__(self, "checkpoint_every", Duration.parse(self.checkpoint_every))
        if self.hang_limit is not None and self.hang_limit.seconds is None:
            raise ValueError(f"hang_limit={self.hang_limit}: give a time, such as 10min")


def of_memory(training: Training) -> dict[str, str]:
    """The settings that change how much memory a step takes, as text."""
    names = (
        "ddp", "fsdp", "pipeline", "activation_checkpointing", "compile", "blocks", "ema", "channels_last",
        "sync_batchnorm",
    )  # fmt: skip
    return {name: str(getattr(training, name)) for name in names}


def checkpointing(text: str) -> tuple[str, int]:
    """Parse `activation_checkpointing` into (none | full | selective, every how many blocks).

    Raises ValueError.
    """
    if text in ("none", "full", "selective"):
        return text, 1
    if text.isdecimal() and int(text) > 0:
        return "full", int(text)
    raise ValueError(
        f"activation_checkpointing={text}: give none, full, selective, or N for every Nth block, such as 2"
    )
