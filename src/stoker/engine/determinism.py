"""The same bits each time: deterministic algorithms alone; where an operation has none, which and where.

What torch promises is described in https://pytorch.org/docs/stable/notes/randomness.html: atomic additions on
GPUs come in any order, cuDNN tries algorithms out, cuBLAS has workspaces that several streams share, and
some operations have no other form.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import os
import re
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from stoker import machine
from stoker.errors import StokerError

log = logging.getLogger("stoker")

_SAID = re.compile(r"(?P<operation>\S+) does not have a deterministic implementation")
_FRAME = re.compile(r'^ *File "(?P<file>.+?)", line (?P<line>\d+)', re.MULTILINE)
_PACKAGES = Path(sysconfig.get_path("purelib"))
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_LOOP = (f"{Path(__file__).parent}{os.sep}", f"{Path(machine.__file__).with_name('loop.py')}")


@dataclass(frozen=True)
class Place:
    """A line of code."""

    file: str
    line: int

    def __str__(self) -> str:
        code = linecache.getline(self.file, self.line).strip()
        return f"{self.file}:{self.line}" + (f" ({code})" if code else "")


def require() -> None:
    """Use only deterministic operations in this process from now on, on CPUs and GPUs.

    An operation that has no such form raises a RuntimeError that names it; see `explained`. Memory that
    torch hands out is not filled first, as it would be: a program that reads it before writing has no right
    result in any case, and filling it costs a pass over memory for every tensor that is made.
    """
    if torch.cuda.is_initialized() and not machine.has_cublas_workspaces():  # type: ignore[no-untyped-call]
        log.warning(
            "CUDA was used before the Trainer was created, so cuBLAS results may differ in their last bits: "
            "set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
        )
    machine.keep_cublas_workspaces()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Autograd remembers within this block which line an operation of the backward pass belongs to.

    That is slow, so it is for one step: an operation without a deterministic form fails in the first.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        detecting = torch.autograd.set_detect_anomaly(True, check_nan=False)
    with detecting:
        yield


@contextlib.contextmanager
def explained(again: Callable[[], object] | None = None) -> Iterator[None]:
    """Say of an operation without a deterministic form, within this block, where it was called.

    Args:
        again: does once more what is done in this block, for an operation of the backward pass that fails in
            a step whose lines were not remembered.

    Raises:
        StokerError: naming the operation, and the line that called it.
    """
    remembered: list[Place] = []
    try:
        with _told(remembered):
            yield
    except RuntimeError as error:
        said = next((found for e in _causes(error) if (found := _SAID.match(str(e)))), None)
        if said is None:
            raise
        place = _of_user(remembered) or _of_user(_frames(error))
        if place is None and again is not None:
            place = _of_user(_remembered(again))
        where = f"; it is called at {place}" if place else "; it is part of the backward pass"
        raise StokerError(
            f"{said['operation']} has no deterministic form, but deterministic=true requires one{where}. "
            "Use a different operation there, or deterministic=false"
        ) from error


def _frames(error: BaseException) -> list[Place]:
    frames = (f for e in _causes(error) for f in traceback.extract_tb(e.__traceback__))
    return [Place(frame.filename, frame.lineno or 0) for frame in frames]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came of: a pipeline's schedule raises its own of what failed in a stage."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _remembered(again: Callable[[], object]) -> list[Place]:
    found: list[Place] = []
    with remembering(), contextlib.suppress(RuntimeError), _told(found):
        again()
    return found


@contextlib.contextmanager
def _told(found: list[Place]) -> Iterator[None]:
    """Add what autograd says, within this block, of the forward pass that led to what fails in the backward
    pass: its calls, the innermost last.
    """
    if not torch.is_anomaly_enabled():
        yield
        return
    others = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for warning in caught:
            if "forward call that caused" in str(warning.message):
                frames = _FRAME.finditer(str(warning.message))
                found += [Place(frame["file"], int(frame["line"])) for frame in frames]
            else:
                others.append(warning)
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _of_user(places: list[Place]) -> Place | None:
    """The innermost line that is nobody's library, else that is of another library than torch.

    What lies outside of the innermost call of the loop only led to it.
    """
    inner = max((number for number, place in enumerate(places) if place.file.startswith(_LOOP)), default=-1)
    below = [place for place in places[inner + 1 :] if not place.file.startswith(_TORCH)]
    own = [place for place in below if not Path(place.file).is_relative_to(_PACKAGES)]
    found = own or below
    return found[-1] if found else None
