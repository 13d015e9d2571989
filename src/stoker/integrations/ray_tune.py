"""A stoker recipe as a trainable of Ray Tune, whose own schedulers drive it.

    tuner = tune.Tuner(
        trainable("my_train.py", {"epochs": 3}),
        param_space={"lr": tune.loguniform(1e-4, 1e-1)},
        tune_config=tune.TuneConfig(metric="val_loss", mode="min", scheduler=ASHAScheduler(), num_samples=20),
    )

A trial is a run, trained in processes next to Ray's actor, which drives it one report at a time: when the
metric is logged, the training waits for the scheduler's decision. A trial that continues from another
trial's checkpoint (population based training) is a separate run.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stoker import config as configs
from stoker import recipes, storage
from stoker.checkpoint import manifest
from stoker.errors import BadInput, StokerError
from stoker.integrations import training
from stoker.integrations.training import DrivenRun
from stoker.run import finding, view
from stoker.run.directory import RunDirectory
from stoker.status import FINISHED
from stoker.tune.domains import text
from stoker.tune.trial import Ended

try:
    import ray
    from ray import tune
    from ray.tune.result import DONE, RESULT_DUPLICATE
except ModuleNotFoundError as error:
    raise BadInput("Ray Tune is not installed: pip install 'stoker[ray]'") from error

_ABOUT = "stoker.json"
"""The file in a Ray checkpoint that says which run it belongs to, its step and its metrics."""
_WEIGHTS = "checkpoint"
_LOOK = 0.05  # seconds between looks for a checkpoint that is being written
_AT_ONCE = 5.0  # seconds in which a training that must end can reach its next report normally


@dataclass(frozen=True)
class _Spec:
    """The settings that all trials of one experiment share."""

    recipe: str
    fixed: Mapping[str, Any]
    metric: str
    runs: Path
    experiment: str
    ranks: int
    folder: Path
    """The folder in which the experiment was started, for relative paths in a recipe."""


def trainable(
    recipe: str | Path | Callable[..., None],
    fixed: Mapping[str, Any] | None = None,
    *,
    metric: str = "val_loss",
    runs: Path | str | None = None,
    experiment: str | None = None,
    nproc: int = 1,
) -> type[tune.Trainable]:
    """Make a trainable from a recipe; the keys of the parameter space are the recipe's config keys.

    A result is reported whenever the recipe logs the metric. It has the latest values of everything that the
    recipe logs, its `step`, and the `run`. Give the scheduler `time_attr="step"` to count by steps, which
    continue when a run resumes from its own checkpoint. By default a trial takes one CPU, and one GPU
    if the cluster has any, for each rank; `tune.with_resources` overrides this.

    Args:
        recipe: a shipped recipe, a file with a `train(run, config)` function, or such a function from a file,
            which all machines can reach.
        fixed: config values that are the same in all trials.
        metric: the same metric that Ray Tune is given.
        runs: the folder that contains the runs, shared by all machines; by default STOKER_RUNS, else `runs`.
        experiment: the folder within `runs` for the trials' runs, by default `RECIPE-tune`.
        nproc: the number of ranks per trial, on one machine.

    Raises:
        BadInput: the recipe does not exist, or its config does not accept a fixed value.
    """
    found = training.recipe_of(recipe)
    given = configs.flatten(fixed or {}, "fixed", configs.describe(found.config))
    for key, value in given.items():
        configs.checked(found.config, key, value, "fixed")
    spec = _Spec(
        found.reference, given, metric, training.runs_folder(runs), experiment or f"{found.name}-tune", nproc,
        Path.cwd(),
    )  # fmt: skip
    return type(found.name, (_RecipeTrainable,), {"spec": spec})


class _RecipeTrainable(tune.Trainable):  # type: ignore[misc]
    """See `trainable`. Ray calls the undocumented methods, see its `tune.Trainable`."""

    spec: _Spec

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        gpus = {"GPU": cls.spec.ranks} if ray.cluster_resources().get("GPU", 0) >= 1 else {}
        return tune.PlacementGroupFactory([{"CPU": cls.spec.ranks, **gpus}])

    def setup(self, config: dict[str, Any]) -> None:
        self._values = {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in configs.flatten(config, "the parameter space").items()
        }
        self._run = self._directory(_named(self.trial_id))
        self._training: DrivenRun | None = None
        self._waits = False
        self._tags = {"ray.trial": self.trial_id}
        self._last: dict[str, Any] = {}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self._training is None:
            self._training = self._started()
        elif self._waits:
            self._training.go_on()
        self._waits = False
        happened = self._training.next()
        while happened is None:
            happened = self._training.next()
        if isinstance(happened, Ended):
            return self._over(happened)
        self._waits = True
        self._last = {
            **happened.metrics, self.spec.metric: happened.value, "step": happened.step,
            "run": self._run.name,
        }  # fmt: skip
        return {**self._last}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        folder = Path(checkpoint_dir)
        found = self._checkpoint(self._last.get("step", 0))
        if found is not None:
            shutil.copytree(
                found.path, folder / _WEIGHTS / found.path.name, copy_function=storage.link_or_copy
            )
        storage.write_json(folder / _ABOUT, {
            "run": self._run.id, "step": found.step if found else None, "last": self._last,
        })  # fmt: skip

    def load_checkpoint(self, checkpoint: str) -> None:
        about = storage.read_json(Path(checkpoint) / _ABOUT)
        self._last = about["last"]
        own = _named(self.trial_id)
        if re.fullmatch(re.escape(own) + r"(-\d+)?", about["run"]):
            self._run = self._directory(about["run"])
        else:
            if about["step"] is None:
                raise StokerError(
                    f"{about['run']} has no checkpoint that another trial could continue from: population "
                    "based training needs a recipe that trains with a Trainer"
                )
            self._run = _next_of(self._directory(own))
            self._tags |= {"forked.from": about["run"], "forked.at": str(about["step"])}
        if about["step"] is not None:
            _go_back(self._run, about["step"], Path(checkpoint) / _WEIGHTS)

    def cleanup(self) -> None:
        run, self._training = self._training, None
        if run is None or not run.running:
            return
        if not self._waits:
            happened = run.next(_AT_ONCE)
            if isinstance(happened, Ended):
                return
            self._waits = happened is not None
        if self._waits:
            run.stop()
        else:
            run.interrupt()

    def _directory(self, run: str) -> RunDirectory:
        return finding.locate(self.spec.runs, self.spec.experiment, run)

    def _started(self) -> DrivenRun:
        overrides = [f"{key}={text(value)}" for key, value in {**self.spec.fixed, **self._values}.items()]
        spec = self.spec
        here = contextlib.chdir(spec.folder) if spec.folder.is_dir() else contextlib.nullcontext()
        with here:  # Ray has changed to the trial's own folder
            job = training.job_of(
                recipes.load(spec.recipe),
                overrides,
                metric=spec.metric,
                run=self._run.path,
                ranks=spec.ranks,
                tags=self._tags,
            )
            return DrivenRun(job, ranks=spec.ranks)

    def _over(self, ended: Ended) -> dict[str, Any]:
        """The last result once more, as Ray expects from a trial that ends on its own. Raises StokerError."""
        if ended.status != FINISHED:
            raise StokerError(f"run {self._run.id} {ended.status}: {ended.error}\n{ended.trace}".strip())
        if not self._last:
            raise StokerError(
                f"the recipe never logs {self.spec.metric}: it logs {', '.join(ended.logged) or 'nothing'}; "
                "set metric= to one of these"
            )
        return {**self._last, DONE: True, RESULT_DUPLICATE: True}

    def _checkpoint(self, step: int) -> manifest.Checkpoint | None:
        """The run's checkpoint at its latest report, which is taken now; None for a loop without a Trainer.

        The training that waits for the answer to that report continues to the next one.
        """
        if not self._run.exists() or view.load(self._run).samples_per_step is None:
            return None
        if self._training is not None and self._waits:
            self._training.go_on(save=True)
            self._waits = False
        while True:
            found, _ = manifest.newest(self._run.checkpoints)
            if found is not None and found.step >= step:
                return found
            if self._training is None or not self._training.running:
                return found
            self._training.look(_LOOK)


def _named(trial: str) -> str:
    """A trial's id as the id of a run."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", trial)


def _next_of(run: RunDirectory) -> RunDirectory:
    """A run of the same trial that does not exist yet: `TRIAL-1`, `TRIAL-2`, ..."""
    number = 1
    while (found := RunDirectory(run.path.with_name(f"{run.id}-{number}"))).path.exists():
        number += 1
    return found


def _go_back(run: RunDirectory, step: int, saved: Path) -> None:
    """Let a run resume from a step: later checkpoints are removed, missing ones are taken from `saved`."""
    for later in manifest.folders(run.checkpoints):
        if manifest.step_of(later) > step:
            manifest.remove(later)
    (source,) = manifest.folders(saved)
    if not any(manifest.step_of(path) == step for path in manifest.committed(run.checkpoints)):
        shutil.copytree(source, run.checkpoints / source.name, dirs_exist_ok=True)
