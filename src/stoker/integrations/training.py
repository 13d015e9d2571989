"""A run that is trained in separate processes and driven from here, one report at a time."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker import config as configs
from stoker import object_store, recipes, store_urls
from stoker.cli import training
from stoker.cli.trial import train_trial
from stoker.errors import BadInput
from stoker.recipes import Recipe
from stoker.run import finding
from stoker.tune import local
from stoker.tune.trial import Began, Ended, Report, TrialJob

_KEPT_WAITING = 60.0  # seconds that a training has for its checkpoint after it is told to stop


def job_of(
    found: Recipe,
    overrides: Iterable[str],
    *,
    metric: str,
    run: Path,
    ranks: int,
    tags: Mapping[str, str],
) -> TrialJob:
    """The settings that the processes of a run need. Raises BadInput for what cannot be trained.

    Args:
        found: the recipe.
        overrides: `key=value` of the recipe's config.
        metric: the metric that is reported when it is logged.
        run: its directory, `RUNS/EXPERIMENT/ID`.
        ranks: the number of processes that train it.
    """
    resolved: Any = configs.resolve(found.config, overrides)
    training.check(found, resolved.config, ranks)
    return TrialJob(
        number=0,
        recipe=found.reference,
        values=resolved.values,
        sources=resolved.sources,
        runs=run.parent.parent,
        sweep=run.parent.name,
        run=run.name,
        metrics=(metric,),
        unit="step",
        provenance=None,
        tags=tags,
    )


def recipe_of(recipe: str | Path | Callable[..., None]) -> Recipe:
    """The recipe of this name, of a file, or of a function. Raises BadInput."""
    if not callable(recipe):
        return recipes.load(str(recipe))
    found = recipes.from_function(recipe)
    if not found.source.is_file() or not getattr(recipe, "__qualname__", "").isidentifier():
        raise BadInput(
            f"{getattr(recipe, '__name__', recipe)}: each trial has its own process, which loads a "
            "function from its file: define it at the top level of a file, and pass that function"
        )
    return found


def runs_folder(given: Path | str | None) -> Path:
    """The folder that contains the runs, with the same default as for every command. Raises BadInput."""
    named = finding.asked_for(given)
    if store_urls.is_url(named) or object_store.of(Path(named).absolute()) is not None:
        raise BadInput(f"runs={named}: a search cannot be in an object store; give a local folder")
    return Path(named).absolute()


class DrivenRun:
    """The processes of one run, from their start to their end.

    Args:
        job: the run, resumed from where it stopped.
        ranks: the number of its processes.
        beside: how many runs share the cores of this machine at a time.
        gpus: one per rank, as CUDA_VISIBLE_DEVICES names them; by default all that this process sees.
    """

    def __init__(self, job: TrialJob, *, ranks: int = 1, beside: int = 1, gpus: Sequence[str] = ()) -> None:
        self._workers = local.Workers(train_trial, parallel=beside, ranks=ranks, gpus=gpus)
        self._happened: collections.deque[Report | Ended] = collections.deque()
        self._workers.start(job)

    @property
    def running(self) -> bool:
        return bool(self._workers.running)

    def look(self, timeout: float | None = None) -> None:
        """Process events for at most so many seconds, unless `next` already has something to return."""
        if not self._happened:
            happened = self._workers.wait(timeout)
            self._happened.extend(one for one in happened if not isinstance(one, Began))
        elif timeout is not None:
            time.sleep(timeout)

    def next(self, timeout: float | None = None) -> Report | Ended | None:
        """Its next report, after which it waits for `go_on`, or how it ended; None after so many seconds."""
        if not self._happened:
            self.look(timeout)
        return self._happened.popleft() if self._happened else None

    def go_on(self, *, save: bool = False) -> None:
        """Answer a report: continue training, and with `save` take a checkpoint at the end of the step."""
        self._workers.answer(0, "continue", save=save)

    def stop(self) -> Ended:
        """Answer a report: the run is over, early."""
        self._workers.answer(0, "stopped", save=False)
        return self._drained()

    def interrupt(self) -> Ended:
        """End it in any state, with a checkpoint from which it can resume later."""
        self._workers.stop()
        return self._drained()

    def _drained(self) -> Ended:
        deadline = time.monotonic() + _KEPT_WAITING
        while True:
            happened = self.next(_KEPT_WAITING)
            if isinstance(happened, Ended):
                return happened
            if isinstance(happened, Report):
                self._workers.answer(0, "stopped", save=False)
            if time.monotonic() > deadline:
                self._workers.kill()
