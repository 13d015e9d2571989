"""What computes: the GPUs, whether torch can use them, and how fast they are; otherwise the CPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from stoker import machine, storage, words
from stoker.doctor.findings import Finding, note, ok, problem, said

_LIST = ("nvidia-smi", "-L")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI ids: a vendor, and the class of display and compute devices
_BUS = Path("/sys/bus/pci/devices")
_TAKEN = 0.1  # a share of a GPU's memory too small to mention
_WHERE = "https://pytorch.org/get-started/locally shows the pip command"


def check() -> Iterator[Finding]:
    """The GPUs, each tested with a small computation; without any, the CPU."""
    try:
        import torch
    except Exception as error:  # a library that it needs has the wrong version, or is missing
        yield problem(f"torch cannot be imported ({said(error)}): pip install --force-reinstall torch")
        return
    driver = _driver()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the findings replace these
        reached = torch.cuda.is_available()
    if reached:
        yield ok(f"torch is built for {_built()}; {_shown(driver)}")
        for number in range(torch.cuda.device_count()):
            yield _gpu(number)
        return
    if driver.gpus:
        yield why_not(driver, torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES"))
    elif _on_bus():
        yield note(
            "this machine has an NVIDIA GPU, but no driver answers: install one; for a container, start it "
            "with the GPU (docker run --gpus all)"
        )
    yield _cpu()


class Driver(NamedTuple):
    """What the NVIDIA driver reports, without torch."""

    gpus: Sequence[str] = ()
    """By name and memory."""
    version: str = ""
    cuda: str = ""
    """The newest CUDA that it supports; empty if unknown."""


def _driver() -> Driver:
    about = machine.hardware()
    if about["gpus"]:
        return Driver(about["gpus"], about["driver"], about["cuda"])
    listed = machine.output(list(_LIST)) or ""
    lines = [line.partition(": ")[2].partition(" (")[0] for line in listed.splitlines()]
    return Driver([line for line in lines if line])


def _shown(driver: Driver) -> str:
    if not driver.version:
        return "the driver does not report its version"
    return f"driver {driver.version} supports CUDA up to {driver.cuda}"


def _built() -> str:
    import torch

    return f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"


def why_not(driver: Driver, built_for: str | None, visible: str | None) -> Finding:
    """Why torch cannot use GPUs that the driver has.

    Args:
        built_for: the CUDA version that torch was built for; None for a build without CUDA.
        visible: CUDA_VISIBLE_DEVICES, or None if it is not set.
    """
    have = words.some(driver.gpus, 2)
    if built_for is None:
        which = f"a build for CUDA {driver.cuda} or older" if driver.cuda else "a build for CUDA"
        return problem(f"there is a GPU ({have}), but torch is built for the CPU: install {which}; {_WHERE}")
    if driver.cuda and _major(driver.cuda) < _major(built_for):
        return problem(
            f"driver {driver.version} is too old: it supports CUDA {driver.cuda}, but torch is built for "
            f"CUDA {built_for}: update the driver, or install torch for CUDA {driver.cuda} or older; {_WHERE}"
        )
    if visible is not None:
        return note(f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs ({have}): unset it to train on them")
    return problem(f"torch cannot use the GPUs ({have}): {_refusal()}; see what `nvidia-smi` reports")


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _refusal() -> str:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return said(error)
    return "it gives no reason"


def _gpu(number: int) -> Finding:
    """A GPU, after a small computation."""
    import torch
    from stoker.engine import flops, precision

    device = torch.device("cuda", number)
    name = torch.cuda.get_device_name(device)
    try:
        with torch.cuda.device(device):
            native = precision.bf16_is_native(device)
            torch.ones(8, device=device).sum().item()
            free, total = torch.cuda.mem_get_info(device)
            peak = flops.peak(device, "bf16" if native else "fp32")
    except RuntimeError as error:
        return problem(
            f"GPU {number}, {name}, does not compute ({said(error)}): see what `nvidia-smi` reports, and "
            f"whether this torch is built for it; {_WHERE}"
        )
    known = "bf16" if native else "no bf16: fp32, or precision=fp16"
    memory = f"{words.size(free)} of {words.size(total)} free"
    text = f"GPU {number}: {name}, {memory}; {known}, {peak.flops / 1e12:.4g} TFLOP/s ({peak.source})"
    if free < (1 - _TAKEN) * total:
        return note(f"{text}; other processes use its memory: `nvidia-smi` lists them")
    return ok(text)


def _cpu() -> Finding:
    from stoker.engine import precision

    speed = precision.bf16_speed(storage.cache_folder() / precision.SPEED, kept=False)
    usual = "bf16" if speed >= precision.WORTH_IT else "fp32"
    return ok(
        f"no GPU: ranks use the CPU, in {usual} by default (bf16 is {speed:.2g} times as fast as fp32, and "
        f"the default from {precision.WORTH_IT:g} times on)"
    )


def _on_bus(devices: Path = _BUS) -> bool:
    """Whether there is an NVIDIA GPU on the PCI bus, whatever the driver says."""

    def says(device: Path, name: str) -> str:
        try:
            return (device / name).read_text(encoding="ascii").strip()
        except OSError:
            return ""

    return any(
        says(device, "vendor") == _NVIDIA and says(device, "class").startswith(_DISPLAY)
        for device in devices.glob("*")
    )
