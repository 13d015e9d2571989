"""A DeepSpeed JSON file, as runs elsewhere have one: what it sets, and what it may not set here.

A run's own keys and the file may not set one value differently; what the file sets alone is taken from it.
It loads no torch.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from stoker.engine.settings import DeepSpeed, Precision, Training
from stoker.errors import BadInput, nearest


def check(training: Training) -> None:
    """Raises BadInput for settings of `parallel=deepspeed` that cannot work on any number of ranks.

    Args:
        training: as `completed` returned it.
    """
    if training.micro_batch == "auto":
        raise BadInput("micro_batch=auto does not work with parallel=deepspeed: set a number")
    if importlib.util.find_spec("deepspeed") is None:
        raise BadInput("parallel=deepspeed needs deepspeed: pip install 'stoker[deepspeed]'")
    chosen = training.deepspeed
    zero_stage = chosen.stage
    assert zero_stage is not None
    given = read(chosen.config)
    if zero_stage < 2 and given.get("data_types", {}).get("grad_accum_dtype", "auto") not in (None, "auto"):
        raise BadInput(
            f"{chosen.config}: data_types.grad_accum_dtype needs stage 2 or 3, but the stage is "
            f"{zero_stage}: remove it from the file, or use another stage"
        )
    by_file = given.get("zero_optimization", {})
    for key, section, asked, least, needs in (
        ("offload_parameters", "offload_param", chosen.offload_parameters, 3, "3"),
        ("offload_optimizer", "offload_optimizer", chosen.offload_optimizer, 1, "1, 2 or 3"),
    ):
        if zero_stage < least and (asked or _offloads(by_file, section)):
            said = f"deepspeed.{key}" if asked else f"{chosen.config}: zero_optimization.{section}"
            raise BadInput(f"{said} needs stage {needs}, but the stage is {zero_stage}")
        if _device(by_file, section) == "nvme":
            raise BadInput(
                f"{chosen.config}: zero_optimization.{section} is on nvme, where no checkpoint reaches it: "
                'use "cpu"'
            )


def _offloads(zero: Mapping[str, Any], section: str) -> bool:
    return _device(zero, section) not in (None, "none", "auto")


def _device(zero: Mapping[str, Any], section: str) -> str | None:
    held = zero.get(section)
    return held.get("device") if isinstance(held, dict) else None


def _stage(chosen: DeepSpeed, file: Mapping[str, Any]) -> int:
    """The ZeRO stage: from the key, else from the file, else 2. Raises BadInput if key and file differ."""
    given = file.get("zero_optimization", {}).get("stage", "auto")
    if chosen.stage is not None and given not in ("auto", chosen.stage):
        raise BadInput(
            f"the ZeRO stage is set twice: deepspeed.stage={chosen.stage}, but {given} in {chosen.config}"
        )
    if chosen.stage is not None:
        return chosen.stage
    return 2 if given == "auto" else int(given)


def read(file: Path | None) -> dict[str, Any]:
    """The contents of a DeepSpeed JSON file; empty if `file` is None. Raises BadInput."""
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"deepspeed.config={file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"deepspeed.config={file} contains a {type(content).__name__}: must be an object")
    if "bfloat16" in content:  # what DeepSpeed called it once
        if "bf16" in content:
            raise BadInput(f"{file} has both bf16 and bfloat16, which are the same: keep only bf16")
        content["bf16"] = content.pop("bfloat16")
    unknown = next((key for key in content if key not in _READ_BY_DEEPSPEED), None)
    if unknown is not None:
        raise BadInput(f"{file}: DeepSpeed does not know {unknown!r}{nearest(unknown, _READ_BY_DEEPSPEED)}")
    content = {key: value for key, value in content.items() if value != "auto"}
    for key, (fits, what) in _OF_DEEPSPEED.items():
        section, _, inner = key.rpartition(".")
        holder = content.get(section, {}) if section else content
        if inner in holder and holder[inner] != "auto" and not fits(holder[inner]):
            raise BadInput(f"{file}: {key} is {json.dumps(holder[inner])}: must be {what}")
    return content


_READ_BY_DEEPSPEED = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types",
    "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state",
    "expert_parallel", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op",
    "gradient_clipping", "gradient_predivide_factor", "hybrid_engine", "log_level",
    "managed_gradient_accumulation", "memory_breakdown", "optimizer", "pipeline", "prescale_gradients",
    "scheduler", "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print",
    "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
    "wall_clock_breakdown", "wandb", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
"""The keys of a DeepSpeed file. It ignores others in silence."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_COUNT = (_is_count, "a whole number above 0")
_OBJECT = (_is_object, "an object")
_SHARED = "under parallel=deepspeed all ranks share the work by batches"
_OF_DEEPSPEED: dict[str, tuple[Callable[[Any], bool], str]] = {  # sections before what is in them
    "zero_optimization": _OBJECT,
    "zero_optimization.stage": (lambda v: type(v) is int and 0 <= v <= 3, "0, 1, 2 or 3"),
    **dict.fromkeys(
        (
            "activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger", "compile", "csv_monitor",
            "data_efficiency", "data_types", "expert_parallel", "flops_profiler", "fp16", "hybrid_engine",
            "tensor_parallel", "tensorboard", "torch_autocast", "wandb",
        ),
        _OBJECT,
    ),
    "tensor_parallel.autotp_size": (lambda v: v in (0, 1), f"0 or 1, since {_SHARED}"),
    "sequence_parallel_size": (lambda v: v in (None, 1), f"1, since {_SHARED}"),
    "expert_parallel.enabled": (lambda v: v is False, f"false, since {_SHARED}"),
    "hybrid_engine.enabled": (lambda v: v is False, "false: a run trains, and generates nothing meanwhile"),
    "bf16.enabled": (lambda v: isinstance(v, bool), "true or false"),
    "fp16.enabled": (lambda v: isinstance(v, bool), "true or false"),
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "gradient_clipping": (lambda v: type(v) in (int, float) and v >= 0, "a number (0 for no clipping)"),
}  # fmt: skip


def completed(training: Training) -> Training:
    """The settings of `parallel=deepspeed` with its stage, and with what a DeepSpeed JSON file sets.

    That is the clipping, the micro-batch and the precision. Other settings are returned as they are.

    Raises BadInput if the file and the run set the same value differently.
    """
    if training.parallel != "deepspeed":
        return training
    file = training.deepspeed.config
    given = read(file)
    training = replace(
        training, deepspeed=replace(training.deepspeed, stage=_stage(training.deepspeed, given))
    )
    if file is None:
        return training
    for section in ("optimizer", "scheduler"):
        if section in given:
            raise BadInput(
                f"{file} sets the {section}, and so does the run: remove this section from the file"
            )
    if given.get("torch_autocast", {}).get("enabled") is True:
        raise BadInput(
            f"{file} enables torch_autocast, but precision=bf16 or fp16 decides what a run is computed in: "
            "remove this section from the file"
        )
    clip_norm = given.get("gradient_clipping", "auto") or None  # 0 is DeepSpeed's word for none
    said: dict[str, tuple[str, Any, Any]] = {
        "clip_norm": ("gradient_clipping", clip_norm, training.clip_norm),
        "micro_batch": (
            "train_micro_batch_size_per_gpu",
            given.get("train_micro_batch_size_per_gpu", "auto"),
            training.micro_batch,
        ),
        "precision": ("its precision", _precision_by(file, given, training.precision), training.precision),
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
                f"set twice: {key}={ours}, but {file} sets {theirs} to {value}: "
                f'use {same}, or "auto" in the file'
            )
        changes[key] = value
    return replace(training, **changes)


def _precision_by(file: Path, given: Mapping[str, Any], ours: Precision) -> Precision:
    """What a DeepSpeed file sets the precision to; auto if nothing.

    Raises BadInput if it sets both, or switches off the run's own.
    """
    enabled = {p: given.get(p, {}).get("enabled") for p in _HALF}
    half = [p for p in _HALF if enabled[p] is True]
    if len(half) > 1:
        raise BadInput(f"{file} enables both bf16 and fp16: keep only one")
    if half:
        return half[0]
    if ours in enabled and enabled[ours] is False:
        raise BadInput(
            f"set twice: precision={ours}, but {file} sets {ours}.enabled to false: "
            'use precision=fp32, or "auto" in the file'
        )
    return "fp32" if ours == "auto" and enabled["bf16"] is False else "auto"


_HALF: tuple[Literal["bf16"], Literal["fp16"]] = ("bf16", "fp16")


def check_batch(training: Training, *, batch_size: int, ranks: int, parts: int) -> None:
    """Raises BadInput if a DeepSpeed file's batch size or gradient accumulation differs from the run's."""
    file = training.deepspeed.config
    if training.parallel != "deepspeed" or file is None:
        return
    given = read(file)
    for theirs, ours in (("train_batch_size", batch_size), ("gradient_accumulation_steps", parts)):
        value = given.get(theirs, "auto")
        if value not in ("auto", ours):
            raise BadInput(
                f"{file} sets {theirs} to {value}, but the run uses {ours} on {ranks} ranks: "
                f'use "auto" in the file, or change batch_size or micro_batch'
            )
