"""Bit-identical results: deterministic algorithms only, and errors that name operations without one.

https://pytorch.org/docs/stable/notes/randomness.html describes what torch guarantees: atomic additions on
GPUs run in any order, cuDNN benchmarks algorithms, cuBLAS has workspaces that several streams share, and
some operations have no deterministic form.
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
_OURS = (f"{Path(__file__).parent}{os.sep}", f"{Path(machine.__file__).with_name('trainer.py')}")


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

    An operation without a deterministic form raises a RuntimeError that names it; see `explained`. Unlike
    torch's default in this mode, new memory is not filled: a program that reads memory before writing it is
    wrong anyway, and filling costs a pass over memory for every new tensor.
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
    """Within this block, autograd records which line each operation of the backward pass belongs to.

    This is slow, so it is used for one step: an operation without a deterministic form fails in the first.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        detecting = torch.autograd.set_detect_anomaly(True, check_nan=False)
    with detecting:
        yield


@contextlib.contextmanager
def explained(again: Callable[[], object] | None = None) -> Iterator[None]:
    """Report where an operation without a deterministic form was called within this block.

    Args:
        again: repeats the work of this block, for an operation of the backward pass that fails in a step
            whose lines were not recorded.

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
    """An error and its causes: a pipeline's schedule wraps the error of a stage in its own."""
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
    """Within this block, collect autograd's traceback of the forward call whose backward pass fails.

    The innermost call comes last.
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
    """The innermost line of the user's own code, else of a library other than torch.

    Lines outside the innermost call of the loop only led to it.
    """
    inner = max((number for number, place in enumerate(places) if place.file.startswith(_OURS)), default=-1)
    below = [place for place in places[inner + 1 :] if not place.file.startswith(_TORCH)]
    own = [place for place in below if not Path(place.file).is_relative_to(_PACKAGES)]
    found = own or below
    return found[-1] if found else None
