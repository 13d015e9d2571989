"""Runs one rank of a trial."""

from __future__ import annotations

import functools
import time
from typing import Any

from stoker import config as configs
from stoker import recipes
from stoker.cli import training
from stoker.duration import Duration
from stoker.errors import BadInput
from stoker.launch import ranks
from stoker.recipes import Recipe
from stoker.run import finding
from stoker.run.directory import RunDirectory
from stoker.tune.plan import SHARE
from stoker.tune.trial import Link, Reporter, TrialJob
from stoker.world import World

_FREE_TIMEOUT = 120.0  # NFS servers release the locks of a lost machine after 90 s by default


def train_trial(job: TrialJob, link: Link) -> dict[str, Any]:
    """Train the trial's run; returns the result in the form of `tune.local.Function`."""
    recipe = loaded(job.recipe)
    resolved: Any = configs.restore(recipe.config, job.values, job.sources)
    training.check(recipe, resolved.config, World.current().size)
    if World.current().rank == 0:
        _wait_until_free(finding.locate(job.runs, job.sweep, job.run))
    run = training.opened(recipe, resolved, job.sweep, job.run, job.runs, provenance=job.provenance)
    run.attempt.leave_to_disk()
    if job.provenance is not None:
        run.attempt.leave_shipping()
    if job.tags:
        run.tag(**job.tags)
    ranks.log_to(run.directory.logs / f"rank-{run.world.rank}.log")
    limit = getattr(resolved.config, "hang_limit", None)
    hangs = limit.seconds if isinstance(limit, Duration) else None
    reporter = Reporter(run.attempt, job.metrics, job.unit, link, waits=job.waits, hang_limit=hangs)
    run.attempt.listen(reporter, job.metrics)
    try:
        _, status = training.work_on(run, recipe, resolved.config, trial=True)
    finally:
        reporter.close()
    if job.unit == SHARE and run.attempt.plan.get("data_share") != resolved.config.data_share:
        raise BadInput("the recipe's Trainer does not get the data share: give it training=config")
    return {"status": status, "logged": sorted(reporter.logged), "values": reporter.values}


@functools.cache
def loaded(reference: str) -> Recipe:
    """The recipe, loaded once per process, since a process may train several trials."""
    return recipes.load(reference)


def _wait_until_free(run: RunDirectory) -> None:
    """Wait for an earlier process of the run to end, left by a killed controller or a lost machine."""
    until = time.monotonic() + _FREE_TIMEOUT
    while run.path.exists() and run.alive and time.monotonic() < until:
        time.sleep(0.05)
