"""The checks, and how one is run: without revealing secrets, and with a time limit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stoker import redaction, threads
from stoker.doctor import folders, gpus, hardware, hub, launchers, meeting, software, trackers
from stoker.doctor.findings import Finding, problem, said
from stoker.errors import StokerError


@dataclass(frozen=True)
class Check:
    """Something to check."""

    area: str
    """Its subject, in a word."""
    find: Callable[[], Iterator[Finding]]
    limit: float | None = 30.0
    """Seconds until its next finding; None: it limits itself."""
    hint: str = "try again when the machine is less busy"
    """What to do if nothing came in that time."""


_HANGS = "a file system may hang (`mount` lists them)"


def of(runs: str) -> tuple[Check, ...]:
    """All checks, in order, for a machine whose runs are in a folder, or at a URL."""
    return (
        Check("software", software.check, hint=_HANGS),
        Check("machine", hardware.check),
        Check("compute", gpus.check, limit=120.0, hint="`nvidia-smi` may show which GPU hangs"),
        Check("ranks", meeting.check, limit=None),
        Check("runs", functools.partial(folders.runs, runs), hint=f"{_HANGS}; use a different --runs"),
        Check("disk", folders.others, hint=_HANGS),
        Check("trackers", functools.partial(trackers.check, runs)),
        Check("hub", hub.check, hint="set HF_HUB_OFFLINE=1 if there is no network"),
        Check("launchers", launchers.check, limit=None),
    )


def made(check: Check) -> Iterator[Finding]:
    """Run a check. An error of the check itself is a finding too."""
    found = check.find() if check.limit is None else _bounded(check, check.limit)
    try:
        for finding in found:
            yield _without_secrets(finding)
    except StokerError as error:
        yield _without_secrets(problem(said(error)))
    except Exception as error:
        yield _without_secrets(
            problem(f"this check failed itself ({type(error).__name__}: {said(error)}): please report it")
        )


def _bounded(check: Check, limit: float) -> Iterator[Finding]:
    """The findings of a check, each from a thread that is abandoned if it takes too long."""
    found = check.find()
    while True:
        waiting = threads.begun(lambda: next(found, None), f"doctor-{check.area}")
        try:
            finding = waiting.result(limit)
        except TimeoutError:
            if waiting.done():
                raise
            yield problem(f"no answer within {limit:.0f} s: {check.hint}")
            return
        if finding is None:
            return
        yield finding


def _without_secrets(finding: Finding) -> Finding:
    return dataclasses.replace(finding, text=redaction.text(finding.text))
