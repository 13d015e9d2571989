"""The precision a forward pass computes in; weights, and what the optimizer adds up, are float32 at least."""

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
from stoker.engine.options import Precision

log = logging.getLogger("stoker")

Resolved = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SPEED = "bf16_speed.json"
"""The file of the cache that says how fast bf16 is."""
WORTH_IT = 1.5
"""Times as fast as fp32, for bf16 to be the default on a CPU."""
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 100  # of measuring that
_MEASURED_SECONDS = 0.1  # after the fewest


def resolve(precision: Precision, device: torch.device, cache: Path) -> Resolved:
    """What `auto` means on this device: bf16 where it is fast, else fp32.

    A GPU that has bf16 is fast at it. Of CPUs some are and on others it is hundreds of times
    slower than fp32: there it is measured once, and remembered in `cache`.
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
    """What weights of a type are kept in, and averaged: float32 in place of narrower ones."""
    return torch.promote_types(dtype, torch.float32)


def bf16_speed(memory: Path, *, kept: bool = True) -> float:
    """How many times as fast as in fp32 layers are in bf16 on this CPU. Draws no random number.

    Measured where the file `memory` does not say, and written there, if it is to be kept.
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
    """What `bf16_speed` depends on."""
    return f"{devices.name(torch.device('cpu'))}, torch {torch.__version__}"


def autocast(precision: Resolved, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def use_tf32(allowed: bool) -> None:
    """Whether float32 products of NVIDIA GPUs may round to TF32, for this process."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def bf16_is_native(device: torch.device) -> bool:
    """Whether the GPU that is the current one computes in bf16 by itself; False for a CPU."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _measured_speed() -> float:
    """Both in turn, the best time of each, so that what else the machine does slows both or neither."""
    best = {False: math.inf, True: math.inf}
    begun = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        best = {enabled: min(known, _seconds_of_layers(enabled)) for enabled, known in best.items()}
        if number >= _FEWEST_ROUNDS and time.perf_counter() - begun > _MEASURED_SECONDS:
            break
    return best[False] / best[True]


def _seconds_of_layers(enabled: bool) -> float:
    """The forward and backward pass of two linear layers, under autocast to bf16 or not."""
    layers = torch.nn.Sequential(torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128))
    x = torch.ones(64, 128)
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = layers(x).sum()
    loss.backward()
    return time.perf_counter() - begun
