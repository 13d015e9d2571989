"""The controller's loop, with an executor whose machines come and go; real trials are in tests/cli."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from optuna.trial import TrialState
from stoker import Run, Trainer, Training, storage
from stoker.cli import trials as trials_seen
from stoker.duration import Duration
from stoker.errors import StokerError
from stoker.report import sweep
from stoker.run import view
from stoker.run.directory import BEST, RunDirectory
from stoker.tune import forking, samplers, schedulers, search, stores
from stoker.tune import study as studies
from stoker.tune.plan import SHARE, Objective, Plan
from stoker.tune.schedulers import Scheduler
from stoker.tune.search import Search
from stoker.tune.seen import Seen
from stoker.tune.space_reading import parse
from stoker.tune.trial import Began, Ended, Report, TrialJob
from test_study import SPACE, Searched


class Cluster:
    """Has room for one trial whenever `rooms` says so, a word for each time it is asked; then always.

    With `ahead` it also has one in its hands, and trains that next.
    """

    def __init__(self, rooms: list[bool], ends: dict[int, list[str]], *, ahead: bool = False) -> None:
        self._rooms, self._ends, self._takes_ahead = rooms, ends, ahead
        self._following: TrialJob | None = None
        self._stopped = False
        self._job: TrialJob | None = None
        self.started: list[int] = []
        self.at_start: Callable[[], None] = lambda: None
        self.at_wait: Callable[[], None] = lambda: None

    def prepare(self) -> None:
        pass

    @property
    def free(self) -> bool:
        return self._job is None and (self._rooms.pop(0) if self._rooms else True)

    @property
    def running(self) -> list[int]:
        return [] if self._job is None else [self._job.number]

    def start(self, job: TrialJob) -> None:
        self._job = job
        self.started.append(job.number)
        self.at_start()

    @property
    def takes_ahead(self) -> bool:
        return self._takes_ahead and self._following is None

    def ahead(self, job: TrialJob) -> None:
        self._following = job

    def wait(self, timeout: float | None = None) -> list[Report | Ended | Began]:
        assert self._job is not None
        self.at_wait()
        number, self._job = self._job.number, None
        status = self._ends.get(number, []).pop(0) if self._ends.get(number) else "finished"
        found: list[Report | Ended | Began] = [Ended(number, status)]
        if status == "finished":
            found = [Report(number, 10, 1.0 + number), Ended(number, status, logged=("val_loss",))]
        if self._following is not None and not self._stopped:
            following, self._following = self._following, None
            self.start(following)
            found.append(Began(following.number))
        return found

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        pass

    def stop(self) -> None:
        self._stopped = True

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


def _search(
    folder: Path,
    cluster: Cluster,
    trials: int,
    rule: Scheduler | None = None,
    sampler: str = "random",
    metrics: Sequence[str] = ("val_loss",),
    **planned: object,
) -> Search:
    kept = stores.JournalFile(folder / "study.journal")
    objectives = tuple(Objective(metric, "min") for metric in metrics)
    study = studies.opened(kept, samplers.make(sampler, SPACE, 0), [one.goal for one in objectives])
    plan = Plan(
        folder=folder,
        recipe="recipe",
        config=SPACE.config,
        objectives=objectives,
        trials=trials,
        provenance=folder / "provenance",
        **planned,
    )
    return Search(plan, SPACE, study, kept, rule or schedulers.make("none"), cluster)


def test_a_search_waits_where_the_machine_of_its_trial_is_lost_until_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(search, "_LOOK", 0.001)
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
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rule = schedulers.make("asha", least=20, most=100)
    _search(tmp_path, Cluster([], {}), 3, rule, whole=100.0).run()
    assert caplog.text.count("rungs are laid out over --most 100") == 1


def _told_at_starts(folder: Path, **asked: object) -> list[int]:
    """How many ends the study knows of when each of four trials is started."""
    cluster, told = Cluster([], {}, ahead=True), []

    def look() -> None:
        known = studies.read(folder / "study.journal").get_trials(states=(TrialState.COMPLETE,))
        told.append(len(known))

    cluster.at_start = look
    searched = _search(folder, cluster, 4, **asked)
    searched.run()
    assert cluster.started == list(searched.trials) == [0, 1, 2, 3]
    assert searched.over
    return told


def test_the_next_trial_is_begun_before_the_end_of_the_last_is_taken_in_where_it_is_known_already(
    tmp_path: Path,
) -> None:
    assert _told_at_starts(tmp_path) == [0, 0, 1, 2]


@pytest.mark.parametrize("asked", [
    {"sampler": "tpe"},  # learns
    {"rule": schedulers.make("median")},  # decides what goes on
    {"deadline": time.monotonic() + 1e6},  # may end the search before; from when tests are collected
], ids=["sampler", "scheduler", "limit"])  # fmt: skip
def test_it_is_not_where_what_happened_counts(tmp_path: Path, asked: dict[str, object]) -> None:
    assert _told_at_starts(tmp_path, **asked) == [0, 1, 2, 3]


def test_a_trial_that_was_killed_goes_on_before_others_are_handed_over(tmp_path: Path) -> None:
    cluster = Cluster([], {1: ["killed"]}, ahead=True)
    searched = _search(tmp_path, cluster, 6)
    searched.run()
    assert cluster.started == [0, 1, 2, 1, 3, 4, 5]
    assert {trial.state for trial in searched.trials.values()} == {"complete"}


@pytest.mark.parametrize("saves", [True, False])
def test_a_trial_that_is_killed_often_goes_on_if_its_checkpoints_do(saves: bool, tmp_path: Path) -> None:
    """It may report only at the end of an epoch, and be preempted several times within one."""
    runs, sweep_of = tmp_path, tmp_path / "sweep"
    sweep_of.mkdir()
    cluster = Cluster([], {0: ["killed"] * 6})
    cluster.at_start = lambda: saves and _trained(runs, "sweep", "trial-0000", 2 * len(cluster.started))
    searched = _search(sweep_of, cluster, 1)
    searched.run()
    assert len(cluster.started) == (7 if saves else 4)
    assert searched.trials[0].state == ("complete" if saves else "failed")


def test_a_trial_that_was_handed_over_and_not_begun_is_begun_when_the_search_goes_on(tmp_path: Path) -> None:
    cluster = Cluster([], {}, ahead=True)
    stopped = _search(tmp_path, cluster, 4)
    cluster.at_wait = lambda: stopped.stop() if len(cluster.started) == 2 else None
    stopped.run()
    assert cluster.started == list(stopped.trials) == [0, 1]
    assert not stopped.over
    assert [trial.state for trial in studies.read(tmp_path / "study.journal").trials] == [
        TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING,
    ]  # fmt: skip
    after = Cluster([], {})
    gone_on = _search(tmp_path, after, 4)
    gone_on.run()
    assert after.started == [2, 3]
    assert gone_on.over
    (tmp_path / "whole").mkdir()
    whole = _search(tmp_path / "whole", Cluster([], {}), 4)
    whole.run()
    assert [trial.params for trial in gone_on.trials.values()] == [t.params for t in whole.trials.values()]


_FULL = "OSError: [Errno 28] No space left on device: 'checkpoints/step-00000005'"


def test_a_trial_that_the_disk_ended_resumes_when_there_is_room_again(tmp_path: Path) -> None:
    """Whether its controller heard of it, or was killed before."""
    (tmp_path / BEST).mkdir()  # the best trial cannot be written down either
    full = Script([Report(0, 1, 1.0), Ended(0, "failed", _FULL, "Traceback"), Ended(1, "preempted")], room=2)
    stopped = _search(tmp_path, full, 3)
    with pytest.raises(
        StokerError, match=r"No space left on device.*make room or repair it, then run the same"
    ):
        stopped.run()
    assert stopped.trials[0].state == "running"
    for number in (0, 1):
        with (
            contextlib.suppress(OSError, RuntimeError),
            Run(tmp_path.name, f"trial-{number:04d}", runs=tmp_path.parent),
        ):
            raise (
                OSError(errno.ENOSPC, "No space left on device", "file")
                if number == 0
                else RuntimeError("bug")
            )
    cluster = Cluster([], {})
    gone_on = _search(tmp_path, cluster, 3)
    gone_on.run()
    assert cluster.started == [0, 2]
    assert [trial.state for trial in gone_on.trials.values()] == ["complete", "failed", "complete"]


@pytest.mark.parametrize("unit", ["epoch", SHARE])
def test_a_trial_whose_run_was_deleted_keeps_its_part_in_the_search(unit: str, tmp_path: Path) -> None:
    """There are no runs here at all."""
    ends = [
        Ended(n, "finished", logged=("val_loss",), values={"val_loss": v}) for n, v in ((0, 3.0), (1, 1.0))
    ]
    stopped = [Report(2, 10, 2.0, 0.5), Ended(2, "stopped")] if unit != SHARE else [Ended(2, "failed")]
    events = [Report(0, 10, 4.0, 0.5), Report(0, 20, 3.0, 0.5), Report(1, 20, 1.0, 0.5), *ends, *stopped]
    if unit == SHARE:
        events = [*(event for event in events if isinstance(event, Ended))]
    rule = schedulers.make("asha-stop", least=100 if unit == SHARE else 5, most=100)
    first = _search(tmp_path, Script(events), 3, rule, unit=unit)
    first.run()
    again = _search(tmp_path, Script([]), 3, rule, unit=unit)
    assert again.best is not None
    assert (again.best.number, again.best.value) == (1, 1.0)
    for number, before in first.trials.items():
        after = again.trials[number]
        assert (after.state, after.values, after.done) == (before.state, before.values, before.done)
        assert after.outcome(again.plan.objectives) == before.outcome(first.plan.objectives)
    assert again.spent == first.spent > 0


def test_the_best_is_printed_where_no_trial_was_trained_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [Report(n, 10, 1.0 + n) for n in range(2)]
    events += [Ended(n, "stopped", values={"val_loss": 1.0 + n, "cost": 7.5}) for n in range(2)]
    rule = schedulers.make("asha-stop", least=5, most=100)
    searched = _search(tmp_path, Script(events, room=2), 2, rule, metrics=("val_loss", "cost"))
    searched.run()
    trials_seen.answer(searched, json=False)
    told = " ".join(capsys.readouterr().out.split())
    assert f"trial-0000 val_loss 1, cost 7.5 x={searched.trials[0].params['x']:.5g}" in told
    again = _search(tmp_path, Script([]), 2, rule, metrics=("val_loss", "cost"))
    assert again.trials[0].others == {"val_loss": 1.0, "cost": 7.5}


class Script:
    """Room for some; each thing that happens is written down beforehand.

    Args:
        begun: the trials that finish as soon as they are begun, after all that is written down.
    """

    def __init__(self, events: list[Report | Ended], room: int = 4, begun: Sequence[int] = (4,)) -> None:
        self._events, self._room, self._begun = events, room, begun
        self.running: list[int] = []

    free = property(lambda self: len(self.running) < self._room)

    def prepare(self) -> None:
        pass

    def start(self, job: TrialJob) -> None:
        self.running.append(job.number)
        if job.number in self._begun:  # in another's place
            self._events += [Report(job.number, 40, 1.0), Ended(job.number, "finished", logged=("val_loss",))]

    def wait(self, timeout: float | None = None) -> list[Report | Ended]:
        event = self._events.pop(0)
        if isinstance(event, Ended):
            self.running.remove(event.number)
        return [event]

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        pass

    stop = kill = close = prepare


def test_a_member_that_is_stopped_is_replaced_though_its_donor_ends_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        forking, "take_checkpoint", lambda donor, run, *, ended: taken.append((donor.id, ended)) or 30
    )
    firsts = [Report(number, 10, value) for number, value in enumerate((3.0, 2.0, 4.0, 1.0))]
    stopped = [
        Report(3, 20, 1.0),
        Report(2, 20, 4.0),
        Ended(3, "finished", logged=("val_loss",)),
        Ended(2, "stopped"),
    ]
    rest = [Ended(number, "finished", logged=("val_loss",)) for number in (0, 1)]
    rule = schedulers.make("pbt", least=10, most=40, population=4)
    found = _search(tmp_path, Script([*firsts, *stopped, *rest]), 4, rule)  # type: ignore[arg-type]
    found.run()
    assert taken == [("trial-0003", True)]
    assert {number: trial.state for number, trial in found.trials.items()} == {
        0: "complete", 1: "complete", 2: "pruned", 3: "complete", 4: "complete",
    }  # fmt: skip


class Saving(Script):
    """As Script, but nothing happens as long as a fork waits for a checkpoint of trial 3, which is written.

    Args:
        writes: begins writing it.
    """

    def __init__(self, events: list[Report | Ended], writes: Callable[[], None]) -> None:
        super().__init__(events)
        self._writes: Callable[[], None] | None = writes
        self.limits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> list[Report | Ended]:
        if 2 in self.running or self._writes is None:
            return super().wait(timeout)
        self._writes, writes = None, self._writes
        self.limits.append(timeout)
        writes()
        return []


def _trained(runs: Path, experiment: str, name: str, steps: int, at_start: float | None = None) -> Run:
    """A run that trained with a Trainer, with a checkpoint every second step.

    Args:
        at_start: what it measures before the first step, and at no other.
    """
    with Run(experiment, name, runs=runs) as run:
        if at_start is not None:
            run.log(step=0, val_loss=at_start)
        trainer = Trainer(
            run, torch.nn.Linear(1, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            loss=lambda output, batch: (output.sum(), len(output)),
            training=Training(precision="fp32", checkpoint_every=Duration(2, "step")),
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(torch.ones(8, 1))
        for batch in trainer.steps(trainer.loader(data, batch_size=4), max_steps=steps):
            trainer.step(batch)
    return run


_STOPPED = [
    *(Report(number, 10, value) for number, value in enumerate((3.0, 2.0, 4.0, 1.0))),
    Report(3, 20, 1.0), Report(2, 20, 4.0), Ended(2, "stopped"),
]  # fmt: skip
_REST = [Ended(number, "finished", logged=("val_loss",)) for number in (0, 1, 3)]


def test_a_fork_waits_for_its_donors_first_checkpoint_which_is_still_being_written(tmp_path: Path) -> None:
    run = _trained(tmp_path, "sweep", "trial-0003", 4)
    written = run.directory.checkpoints.rename(tmp_path / "written")
    cluster = Saving([*_STOPPED, *_REST], lambda: shutil.move(written, run.directory.checkpoints))
    rule = schedulers.make("pbt", least=10, most=40, population=4)
    found = _search(tmp_path / "sweep", cluster, 4, rule)  # type: ignore[arg-type]
    found.run()
    assert cluster.limits == [search._LOOK]
    assert (found.trials[4].parent, found.trials[4].replaces, found.trials[4].origin[0]) == (3, 2, 4)
    assert found.over


def test_another_donor_is_chosen_if_one_fails_before_its_first_checkpoint(tmp_path: Path) -> None:
    shutil.rmtree(_trained(tmp_path, "sweep", "trial-0003", 4).directory.checkpoints)
    _trained(tmp_path, "sweep", "trial-0001", 6)
    order = ((3, 10, 1.0), (2, 10, 4.0), (0, 10, 3.0), (1, 10, 2.0), (3, 20, 1.0), (1, 20, 2.0), (2, 20, 4.0))
    reports = [Report(number, step, value) for number, step, value in order]
    ends = [Ended(2, "stopped"), Ended(3, "failed", "out of memory"), *_REST[:2]]
    rule = schedulers.make("pbt", least=10, most=40, population=4, quantile=0.34)
    found = _search(tmp_path / "sweep", Saving([*reports, *ends], lambda: None), 4, rule)  # type: ignore[arg-type]
    found.run()
    assert (found.trials[4].parent, found.trials[4].origin[0]) == (1, 6)


def test_a_fork_that_fails_at_once_is_followed_by_one_that_keeps_what_is_no_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forking, "take_checkpoint", lambda donor, run, *, ended: 20)
    error = "the checkpoint is from a different model; tensors with a different shape: weight"
    rest = [Ended(4, "failed", error), Report(5, 30, 1.5), *_REST, Ended(5, "finished", logged=("val_loss",))]
    rule = schedulers.make("pbt", least=10, most=40, population=4, resample=1.0)
    found = _search(tmp_path, Script([*_STOPPED, *rest], begun=()), 4, rule)  # type: ignore[arg-type]
    found.run()
    donor, unfit, other = (found.trials[number] for number in (3, 4, 5))
    assert [(t.state, t.replaces) for t in (unfit, other)] == [("failed", 2), ("complete", 2)]
    assert unfit.params["layers"] != donor.params["layers"] == other.params["layers"]
    assert other.params["x"] != donor.params["x"]
    assert list(other.values.items()) == [(10.0, 1.0), (20.0, 1.0), (30.0, 1.5)]
    assert f"trial 4 cannot go on from the checkpoint of trial 3 with other values ({error})" in caplog.text
    assert "copies keep their donor's layers and explore x, as no key" in caplog.text
    again = _search(tmp_path, Script([]), 4, rule)  # type: ignore[arg-type]
    for searched in (found, again):
        told = trials_seen.told(searched.trials[4], searched)
        assert (told["value"], told["values"], told["objectives"]) == (None, [], {"val_loss": None})
    again.run()
    assert list(again.trials) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("ends", [
    [Ended(4, "killed")] * (search._RESTARTS + 1),
    [Ended(4, "failed", "trial-0004 made no step for 1800 s and was stopped")],
    [Ended(4, "failed", "AcceleratorError: CUDA error: unspecified launch failure", "Traceback")],
], ids=["killed", "hung", "raised"])  # fmt: skip
def test_a_fork_that_fails_at_once_for_another_reason_is_followed_by_one_that_explores_all(
    ends: list[Report | Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(forking, "take_checkpoint", lambda donor, run, *, ended: 20)
    rest = [*ends, Report(5, 30, 1.5), *_REST, Ended(5, "finished", logged=("val_loss",))]
    rule = schedulers.make("pbt", least=10, most=40, population=4, resample=1.0)
    found = _search(tmp_path, Script([*_STOPPED, *rest], begun=()), 4, rule)  # type: ignore[arg-type]
    found.run()
    assert [(found.trials[n].state, found.trials[n].replaces) for n in (4, 5)] == [
        ("failed", 2), ("complete", 2),
    ]  # fmt: skip
    drawn = SPACE.perturbed(
        found.trials[3].params, np.random.default_rng([0, 5]), resample=1.0, factors=rule.factors
    )
    assert found.trials[5].params == drawn
    assert drawn["layers"] != found.trials[3].params["layers"]
    assert "cannot go on from the checkpoint" not in caplog.text


def test_of_an_unfit_fork_in_a_space_of_floats_only_its_error_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = "the checkpoint is from a different model; tensors missing: weight"
    unfit = Seen(4, {"x": 0.5}, "failed", parent=3, error=error)
    forking.say_unfit(unfit, {4: unfit}, parse(["x=uniform(0, 1)"], Searched))
    assert caplog.messages == [
        f"trial 4 cannot go on from the checkpoint of trial 3 with other values ({error})"
    ]


def test_two_forks_that_fail_at_once_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "take_checkpoint", lambda donor, run, *, ended: 20)
    events = [*_STOPPED, Ended(4, "failed", "no"), Ended(5, "failed", "no"), *_REST]
    rule = schedulers.make("pbt", least=10, most=40, population=4)
    found = _search(tmp_path, Script(events, begun=()), 4, rule)  # type: ignore[arg-type]
    found.run()
    assert [trial.state for trial in found.trials.values()] == [
        "complete", "complete", "pruned", "complete", "failed", "failed",
    ]  # fmt: skip


def test_trials_that_are_refused_alike_end_a_search_on_whichever_machines_they_were(tmp_path: Path) -> None:
    ends = [
        Ended(number, "failed", "no data", refused=True, where=f"host{number % 4} (10.0.0.{number % 4})")
        for number in range(9)
    ]
    found = _search(tmp_path, Script([*ends], room=1, begun=()), 9)  # type: ignore[arg-type]
    with pytest.raises(StokerError, match=r"^5 trials were .* error: no data \(on host0 \(10.* and host3 \("):
        found.run()
    assert [trial.error for trial in found.trials.values()] == [end.said for end in ends[:5]]
    assert found.trials[3].error == "no data (on host3 (10.0.0.3))"


def test_the_best_that_a_search_writes_down_is_the_one_that_it_prints(tmp_path: Path) -> None:
    rule = schedulers.make("asha-stop", least=5, most=100, factor=2)
    stopped = [Report(0, 10, 2.0), Report(1, 10, 1.0), Ended(0, "stopped"), Ended(1, "stopped")]
    _search(tmp_path, Script(stopped, room=2), 2, rule).run()  # type: ignore[arg-type]
    best = storage.read_json(tmp_path / BEST)
    assert (best["run"], best["metric"], best["value"]) == ("trial-0001", "val_loss", 1.0), "none is complete"
    with Run(tmp_path.name, "trial-0000", runs=tmp_path.parent) as run:  # by hand, to its end
        run.log(step=100, val_loss=1.5)
    again = _search(tmp_path, Script([]), 2, rule)  # type: ignore[arg-type]
    again.run()
    assert [(t.state, t.value) for t in again.trials.values()] == [("complete", 1.5), ("pruned", 1.0)]
    assert storage.read_json(tmp_path / BEST)["run"] == "trial-0000"


def test_its_report_names_the_same_best_where_a_step_is_more_to_one_trial_than_to_another(
    tmp_path: Path,
) -> None:
    rule = schedulers.make("asha-stop", least=5, most=100, factor=2)
    stopped = [Report(0, 40, 2.0, 0.25), Report(1, 10, 1.0, 1.0), Ended(0, "stopped"), Ended(1, "stopped")]
    searched = _search(tmp_path, Script(stopped, room=2), 2, rule, unit="epoch")  # type: ignore[arg-type]
    searched.run()
    assert searched.best is searched.trials[1]
    said = {"metric": "val_loss", "goal": "min", "sampler": "random", "scheduler": "asha-stop",
            "recipe": "a.py", "seed": 0}  # fmt: skip
    page = sweep.render(studies.read(tmp_path / "study.journal"), said, "search")
    assert "trial-0001" in page.partition("Best</h2>")[2].partition("</section>")[0]


@pytest.mark.parametrize("ended", [
    Ended(0, "finished", logged=("val_loss",), values={"val_loss": 9.0}),  # logged before the first step only
    Ended(0, "failed", "rank 1 failed: no"),  # after rank 0 had finished
], ids=["without a value", "of two ranks"])  # fmt: skip
def test_a_trial_that_failed_though_its_run_has_finished_is_not_complete_later(
    ended: Ended, tmp_path: Path
) -> None:
    run = _trained(tmp_path, "sweep", "trial-0000", 2, at_start=9.0)
    if ended.status == "failed":
        with Run("sweep", "trial-0000", runs=tmp_path) as run:
            run.log(step=3, val_loss=1.0)
    assert view.load(run.directory).status == "finished"
    first = _search(tmp_path / "sweep", Script([ended], begun=()), 1)  # type: ignore[arg-type]
    first.run()
    again = _search(tmp_path / "sweep", Script([]), 1)  # type: ignore[arg-type]
    for searched in (first, again):
        assert searched.trials[0].state == "failed"
        assert searched.best is None
    as_reported = studies._as_trained(
        studies.read(tmp_path / "sweep" / "study.journal"), tmp_path / "sweep",
        {"metric": "val_loss", "goal": "min"},
    )  # fmt: skip
    assert [trial.state for trial in as_reported.trials] == [TrialState.FAIL]


def test_a_donor_of_which_nothing_is_saved_ends_the_search(tmp_path: Path) -> None:
    with Run("sweep", "trial-0003", runs=tmp_path) as run:
        run.log(step=20, val_loss=1.0)
    rule = schedulers.make("pbt", least=10, most=40, population=4)
    found = _search(tmp_path / "sweep", Script([*_STOPPED, *_REST]), 4, rule)  # type: ignore[arg-type]
    with pytest.raises(StokerError, match=r"trial-0003 has no checkpoint .* trains with a Trainer"):
        found.run()


def test_of_a_donor_that_has_ended_the_checkpoint_before_its_end_is_taken(tmp_path: Path) -> None:
    run = _trained(tmp_path, "sweep", "trial-0000", 5)
    begun = RunDirectory(tmp_path / "sweep" / "trial-0001")
    for ended, step in ((False, 5), (True, 4)):
        assert forking.take_checkpoint(run.directory, begun, ended=ended) == step
        assert [path.name for path in begun.checkpoints.iterdir()] == [f"step-{step:08d}"]
    for earlier in ("step-00000002", "step-00000004"):
        shutil.rmtree(run.directory.checkpoints / earlier, ignore_errors=True)
    assert forking.take_checkpoint(run.directory, begun, ended=True) is None


def test_what_is_taken_in_of_a_training_on_a_share_is_a_number(tmp_path: Path) -> None:
    rule = schedulers.make("asha", least=50, most=100, factor=2)
    searched = _search(tmp_path, Cluster([], {}), 1, rule, unit=SHARE)
    with Run(tmp_path.name, "trial-0000-on-50", runs=tmp_path.parent) as run:
        for step, value in enumerate((2.0, 1.0, math.nan), 1):  # as a mean over ranks may be
            run.log(step=step, val_loss=value)
    trial = Seen(0, {})
    assert searched._run_of_shares(trial) is None
    assert trial.values == {50.0: 1.0}


def test_shares_of_the_data_are_told_as_they_are(tmp_path: Path) -> None:
    end = Ended(0, "finished", logged=("val_loss",), values={"val_loss": 2.0})
    rule = schedulers.make("asha", least=100 / 9, most=100, factor=9)
    searched = _search(tmp_path, Script([end], begun=()), 1, rule, unit=SHARE)  # type: ignore[arg-type]
    searched.run()
    assert trials_seen.told(searched.trials[0], searched)["values"] == [[100 / 9, 2.0]]
