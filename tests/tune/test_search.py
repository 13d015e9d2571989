"""The controller's loop, with an executor whose machines come and go; real trials are in tests/cli."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from stoker.tune import schedulers, search
from stoker.tune import study as studies
from stoker.tune.plan import Objective, Plan
from stoker.tune.schedulers import Scheduler
from stoker.tune.search import Search
from stoker.tune.trial import Ended, Job, Report
from test_study import SPACE


class Cluster:
    """Has room for one trial whenever `rooms` says so, a word for each time it is asked; then always."""

    def __init__(self, rooms: list[bool], ends: dict[int, list[str]]) -> None:
        self._rooms, self._ends = rooms, ends
        self._job: Job | None = None
        self.started: list[int] = []

    def prepare(self) -> None:
        pass

    @property
    def free(self) -> bool:
        return self._job is None and (self._rooms.pop(0) if self._rooms else True)

    @property
    def running(self) -> list[int]:
        return [] if self._job is None else [self._job.number]

    def start(self, job: Job) -> None:
        self._job = job
        self.started.append(job.number)

    def wait(self, timeout: float | None = None) -> list[Report | Ended]:
        assert self._job is not None
        number, self._job = self._job.number, None
        status = self._ends.get(number, []).pop(0) if self._ends.get(number) else "finished"
        if status != "finished":
            return [Ended(number, status)]
        return [Report(number, 10, 1.0 + number), Ended(number, status, logged=("val_loss",))]

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        pass

    def stop(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


def _search(
    folder: Path, cluster: Cluster, trials: int, rule: Scheduler | None = None, **planned: object
) -> Search:
    kept = studies.JournalFile(folder / "study.journal")
    study = studies.opened(kept, studies.sampler("random", SPACE, 0), ["min"])
    plan = Plan(
        folder, "recipe", SPACE.config, (Objective("val_loss", "min"),), trials, folder / "provenance",
        **planned,
    )  # fmt: skip
    return Search(plan, SPACE, study, kept, rule or schedulers.make("none"), cluster)


def test_a_search_waits_where_the_machine_of_its_trial_is_lost_until_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(search, "_LOOK", 0.001)
    monkeypatch.setattr(logging.getLogger("stoker"), "propagate", True)
    cluster = Cluster([True, *[False] * 7], {0: ["killed"]})
    searched = _search(tmp_path, cluster, 2)
    searched.run()
    assert cluster.started == [0, 0, 1]
    assert searched.over
    assert [trial.state for trial in searched.trials.values()] == ["complete", "complete"]
    assert caplog.text.count("no machine has room for a trial now") == 1


def test_a_search_that_is_over_waits_for_no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_LOOK", 0.001)
    cluster = Cluster([True, *[False] * 1000], {})
    searched = _search(tmp_path, cluster, 1)
    searched.run()
    assert searched.over
    assert len(cluster._rooms) > 990


def test_trials_that_end_long_before_a_whole_one_are_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("stoker"), "propagate", True)
    rule = schedulers.make("asha", least=20, most=100)
    _search(tmp_path, Cluster([], {}), 3, rule, whole=100.0).run()
    assert caplog.text.count("rungs are laid out over --most 100") == 1
