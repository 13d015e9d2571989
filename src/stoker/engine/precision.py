"""The precision of the forward pass. Weights and the optimizer's sums are always at least float32."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from stoker import storage
from stoker.engine import device as devices
from stoker.engine.settings import Precision

log = logging.getLogger("stoker")

Resolved = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SPEED = "bf16_speed.json"
"""The cache file that holds the measured speed of bf16."""
WORTH_IT = 1.5
"""How many times as fast as fp32 bf16 must be to become the default on a CPU."""
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 100  # of measuring the speed
_MEASURED_SECONDS = 0.1  # after the fewest rounds


def resolve(precision: Precision, device: torch.device, cache: Path) -> Resolved:
    """What `auto` means on this device: bf16 if it is fast, else fp32.

    bf16 is fast on a GPU that supports it. On some CPUs it is fast too, and on others hundreds of times
    slower than fp32: on CPUs it is measured once, and remembered in `cache`.
    """
    if precision == "fp16" and bf16_is_native(device):
        log.warning("precision=fp16: this GPU supports bf16, which is as fast and needs no loss scaling")
    if device.type == "cpu" and precision in ("auto", "bf16"):
        speed = bf16_speed(cache / SPEED)
        if precision == "bf16" and speed < 0.5:
            log.warning("precision=bf16: on this CPU, layers take %.0f times as long as in fp32", 1 / speed)
        if precision == "auto":
            return "bf16" if speed >= WORTH_IT else "fp32"
    if precision != "auto":
        return precision
    return "bf16" if bf16_is_native(device) else "fp32"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights are kept and averaged: float32 instead of narrower types."""
    return torch.promote_types(dtype, torch.float32)


def bf16_speed(memory: Path, *, kept: bool = True) -> float:
    """How many times as fast as fp32 bf16 layers are on this CPU. Draws no random numbers.

    If the file `memory` has no value, it is measured, and written there if `kept`.
    """
    known = storage.read_json(memory)
    key = measured_for()
    if key not in known:
        state = torch.get_rng_state()
        known[key] = _measured_speed()
        torch.set_rng_state(state)
        if kept:
            log.info("bf16 is %.2g times as fast as fp32 on this CPU (measured once)", known[key])
            storage.write_json(memory, known)
    return float(known[key])


def measured_for() -> str:
    """What the result of `bf16_speed` depends on."""
    return f"{devices.name(torch.device('cpu'))}, torch {torch.__version__}"


def autocast(precision: Resolved, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def use_tf32(allowed: bool) -> None:
    """Set whether float32 products on NVIDIA GPUs may round to TF32, for this process."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def bf16_is_native(device: torch.device) -> bool:
    """Whether the current GPU computes in bf16 natively; False for a CPU."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _measured_speed() -> float:
    """Measure both alternately and take the best times, so that other load slows down both or neither."""
    best = {False: math.inf, True: math.inf}
    begun = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        best = {enabled: min(known, _seconds_of_layers(enabled)) for enabled, known in best.items()}
        if number >= _FEWEST_ROUNDS and time.perf_counter() - begun > _MEASURED_SECONDS:
            break
    return best[False] / best[True]


def _seconds_of_layers(enabled: bool) -> float:
    """Seconds for the forward and backward pass of two linear layers, with or without bf16 autocast."""
    layers = torch.nn.Sequential(torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128))
    x = torch.ones(64, 128)
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = layers(x).sum()
    loss.backward()
    return time.perf_counter() - begun
