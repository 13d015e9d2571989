"""The launcher's side of `supervision`: what it reads of its ranks, and where a process is by its stacks."""

from __future__ import annotations

import contextlib
import re
import sysconfig
import time
from pathlib import Path

from stoker.supervision import LAYOUT, REFUSED, RUN, TWICE, Pulse

_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')
_LIBRARIES = (
    *{sysconfig.get_path(kind) for kind in ("stdlib", "platlib", "purelib")},
    str(Path(__file__).parent.parent),
    "<frozen",
)


def read(folder: Path) -> dict[int, Pulse]:
    """The pulses of a launch, by rank."""
    found = {}
    for file in folder.glob("rank-*.pulse"):
        content = file.read_bytes()
        if len(content) == LAYOUT.size:
            found[int(file.stem.removeprefix("rank-"))] = Pulse(*LAYOUT.unpack(content))
    return found


def place(stacks: str) -> str:
    """Where a process is, from the stacks of `supervision.write_stacks_to`: `train.py:31 (in evaluate)`.

    This is the innermost line of the main thread that belongs neither to a library nor to stoker, and the
    function that it called. Empty if there is no such line.
    """
    main = stacks.rpartition("(most recent call first):")[2]  # the main thread comes last
    called = ""
    for file, line, name in _FRAME.findall(main):
        if not file.startswith(_LIBRARIES):
            return f"{Path(file).name}:{line}{called}"
        called = f" (in {name})"
    return ""


def stacks_folder(logs: Path) -> Path:
    """Create a folder for stacks in a run's logs, named after the current time."""
    folder = logs / time.strftime("stacks-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_of(folder: Path) -> Path | None:
    """The path of a launch's run; None until a rank has written it."""
    file = folder / RUN
    return Path(file.read_text(encoding="utf-8")) if file.exists() else None


def refused(folder: Path) -> str:
    """Why a rank cannot take part, if that has ended the ranks of a launch; else empty."""
    file = folder / REFUSED
    return file.read_text(encoding="utf-8") if file.exists() else ""


def tell_twice(folder: Path) -> None:
    """Let the ranks of a launch know that they are told to stop for the second time."""
    with contextlib.suppress(OSError):  # of a full disk, for example: they will be ended anyway
        (folder / TWICE).touch()
