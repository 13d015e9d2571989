"""The process that ships all trials of a search: no trial is in the way of another."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, cast

import pytest
from stoker import storage
from stoker.run import additions, view
from stoker.run.directory import SWEEP, SWEEP_LOCK, RunDirectory
from stoker.threads import begun
from stoker.tracking import follower, ledger, sinks, sweep_follower
from stoker.tracking.shipping import SweepShipping
from stoker.tracking.sink import Batch, Ending, SinkRun
from stoker.tune import record
from synthetic_run import DEADLINE, Seen, Trainer, make_run, until


class Tracker:
    """A sink that keeps what it is given, by trial; a test can do something while it opens or ships."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.opens: Callable[[RunDirectory], None] = lambda run: None
        self.ships: Callable[[RunDirectory], None] = lambda run: None

    def __call__(self, run: RunDirectory) -> _Sink:
        return _Sink(run, self)


class _Sink:
    def __init__(self, run: RunDirectory, tracker: Tracker) -> None:
        self._run, self._tracker = run, tracker

    def open(self, known: str | None, started: float, mark: Any, edition: str) -> SinkRun:
        self._tracker.opens(self._run)
        return SinkRun(self._run.id, "here")

    def ship(self, batch: Batch) -> None:
        self._tracker.ships(self._run)
        steps = self._tracker.steps.setdefault(self._run.id, [])
        steps += [point.step for point in batch.points]

    def conclude(self, ending: Ending) -> None:
        self._tracker.ended[self._run.id] = ending.status

    def close(self) -> None:
        pass


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    tracker = Tracker()
    monkeypatch.setenv("STOKER_SINKS", "tensorboard")
    monkeypatch.setitem(sinks.SINKS, "tensorboard", tracker)
    return tracker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "search"


@pytest.fixture
def following(folder: Path, tracker: Tracker) -> Iterator[Callable[[], Future[bool]]]:
    """Start to follow the search, which ends with the test."""
    folder.mkdir(parents=True)
    lock = storage.try_lock(folder / SWEEP_LOCK)
    assert lock is not None
    running: list[Future[bool]] = []

    def start() -> Future[bool]:
        running.append(begun(lambda: sweep_follower.follow_sweep(folder, patience=0.0), "follower"))
        return running[-1]

    yield start
    os.close(lock)
    wait(running, DEADLINE)


@pytest.mark.parametrize("gone", [True, False], ids=["removed", "unwritable"])
def test_a_trial_that_cannot_be_shipped_does_not_keep_the_others_from_it(
    gone: bool, folder: Path, tracker: Tracker, following: Callable[[], Future[bool]]
) -> None:
    first, second, third = (_trial(folder, number) for number in range(3))

    def prevent(run: RunDirectory) -> None:
        if run.id == first.id and second.path.exists():
            shutil.rmtree(second.path if gone else second.sinks, ignore_errors=True)
            if not gone:
                second.sinks.touch()

    tracker.opens = prevent
    running = following()
    until(lambda: tracker.ended == {first.id: "finished", third.id: "finished"})
    late = _trial(folder, 3)
    until(lambda: late.id in tracker.ended)
    assert not running.done()


def test_a_sink_that_fails_is_asked_less_and_less_often_and_the_search_says_so(
    folder: Path,
    tracker: Tracker,
    following: Callable[[], Future[bool]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(follower, "INTERVAL", 0.05)
    attempts: list[float] = []

    def fail(run: RunDirectory) -> None:
        attempts.append(time.monotonic())
        raise ConnectionError("nobody is there")

    tracker.opens = fail
    trial = _trial(folder, 0)
    following()
    until(lambda: len(attempts) >= 5)
    waits = [after - before for before, after in itertools.pairwise(attempts)]
    assert all(waits[n] >= follower.pause(n + 1, alone=False) == 0.1 * 2**n for n in range(4)), waits
    shipping = SweepShipping(folder, ["tensorboard"])
    shipping._process = cast("Any", _Runs())
    for _ in range(2):
        shipping.look_after()
    assert caplog.text.count("cannot ship to tensorboard now (ConnectionError: nobody is there)") == 1
    tracker.opens = lambda run: None
    until(lambda: trial.id in tracker.ended)
    until(lambda: follower.failing(trial) == {})  # it is written after the sink has ended


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
def test_the_search_in_mlflow_began_with_it_and_has_the_best_trial(
    runs: Path, seen: Callable[[Path], Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_SINKS", "mlflow")
    folder = runs / "digits"
    folder.mkdir()
    about = {"uid": "one", "space": {"lr": "log(0.1, 1)"}, "metric": "loss", "goal": "min"}
    storage.write_json(folder / SWEEP, about)
    os.utime(folder / SWEEP, (1e9, 1e9))
    _trial(folder, 0)
    best = {"run": "trial-0001", "metric": "loss", "value": 3.0, "params": {"lr": 0.1, "rank": 4}}
    later = {"run": "trial-0000", "metric": "loss", "value": 1.0, "params": {"lr": 0.2}}
    for known in (None, best, best, later):
        if known is not None:
            record.note_best(folder, known)
        assert sweep_follower.follow_sweep(folder)
        (parent,) = (run for run in seen(runs).runs if "stoker.sweep.uid" in run.data.tags)
        assert (parent.info.start_time, parent.info.status) == (1e12, "FINISHED")
        assert parent.data.metrics == ({"loss": known["value"]} if known is not None else {})
        tags = {k: v for k, v in parent.data.tags.items() if k.startswith("stoker.best")}
        assert tags == _best_as_tags(known)
    assert len(seen(runs).client.get_metric_history(parent.info.run_id, "loss")) == 2


def _best_as_tags(known: Mapping[str, Any] | None) -> dict[str, str]:
    if known is None:
        return {}
    values = {f"stoker.best.{key}": str(value) for key, value in known["params"].items()}
    return {"stoker.best": known["run"], **values}


def test_a_trial_that_its_search_gives_up_is_stopped_and_one_that_goes_on_is_not(
    folder: Path, tracker: Tracker, following: Callable[[], Future[bool]]
) -> None:
    given_up, resumed = _trial(folder, 0, "paused"), _trial(folder, 1, "paused")
    following()
    until(lambda: tracker.ended == {given_up.id: "paused", resumed.id: "paused"})
    for trial in (given_up, resumed):
        additions.add(trial, {"given_up": {"of": 1}})
    Trainer(resumed).end("finished")
    until(lambda: tracker.ended == {given_up.id: "stopped", resumed.id: "finished"})
    assert [view.load(trial).status for trial in (given_up, resumed)] == ["stopped", "finished"]


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
def test_a_sink_that_fails_does_not_keep_mlflow_from_the_end_of_the_search(
    runs: Path, tracker: Tracker, seen: Callable[[Path], Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_SINKS", "tensorboard,mlflow")
    (runs / "digits").mkdir()
    (runs / "digits" / SWEEP).write_text('{"uid": "one", "space": {}}')
    _trial(runs / "digits", 0)

    def fail(run: RunDirectory) -> None:
        raise ConnectionError("nobody is there")

    tracker.opens = fail
    assert not sweep_follower.follow_sweep(runs / "digits", patience=0.0)
    assert [run.info.status for run in seen(runs).runs] == ["FINISHED", "FINISHED"]


class _Runs:
    """A process that has not ended."""

    def poll(self) -> None:
        return None


def test_a_trial_that_logs_faster_than_it_is_shipped_leaves_the_others_their_turn(
    folder: Path, tracker: Tracker, following: Callable[[], Future[bool]]
) -> None:
    fast = Trainer(_new(folder, 0))
    fast.log(1, loss=1.0)
    other = _trial(folder, 1)
    over = threading.Event()

    def log_meanwhile(run: RunDirectory) -> None:
        if run.id == fast.directory.id and not over.is_set():
            fast.log(len(tracker.steps.get(run.id, [])) + 2, loss=1.0)

    tracker.ships = log_meanwhile
    running = following()
    until(lambda: other.id in tracker.ended)
    over.set()
    fast.end("finished")
    until(lambda: fast.directory.id in tracker.ended)
    steps = tracker.steps[fast.directory.id]
    assert steps == [*range(1, len(steps) + 1)]
    assert not running.done()


def test_a_paused_trial_that_resumes_while_it_is_shipped_leaves_the_others_their_turn(
    folder: Path, tracker: Tracker, following: Callable[[], Future[bool]]
) -> None:
    paused, other = _trial(folder, 0, "paused"), _trial(folder, 1)
    resumed: list[Trainer] = []

    def resume(run: RunDirectory) -> None:
        if run.id == paused.id and not resumed:
            resumed.append(Trainer(run))
            resumed[0].log(2, loss=1.0)

    tracker.opens = resume
    following()
    until(lambda: other.id in tracker.ended)
    until(lambda: tracker.steps.get(paused.id) == [1, 2])
    assert paused.id not in tracker.ended, "it is running"
    resumed[0].end("finished")
    until(lambda: tracker.ended.get(paused.id) == "finished")


def test_a_running_trial_that_logs_nothing_is_not_opened_again(
    folder: Path, tracker: Tracker, following: Callable[[], Future[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "INTERVAL", 0.01)
    idle, opened = Trainer(_new(folder, 0)), []
    idle.log(1, loss=1.0)
    tracker.opens = lambda run: opened.append(run.id)
    following()
    until(lambda: tracker.steps == {"trial-0000": [1]})
    other = _trial(folder, 1)
    until(lambda: other.id in tracker.ended)
    time.sleep(1.0)
    assert opened == ["trial-0000", "trial-0001"]
    idle.log(2, loss=1.0)
    until(lambda: tracker.steps["trial-0000"] == [1, 2])
    idle.end("finished")
    until(lambda: tracker.ended.get("trial-0000") == "finished")


def test_a_search_is_not_over_while_a_trial_outlives_it(folder: Path, tracker: Tracker) -> None:
    trainer = Trainer(_new(folder, 0))
    trainer.log(1, loss=1.0)
    following = begun(lambda: sweep_follower.follow_sweep(folder, patience=DEADLINE), "follower")
    until(lambda: tracker.steps == {"trial-0000": [1]})
    time.sleep(2 * follower.INTERVAL)
    assert not following.done()
    trainer.log(2, loss=1.0)
    trainer.end("finished")
    assert following.result(DEADLINE)
    assert tracker.steps == {"trial-0000": [1, 2]}
    assert tracker.ended == {"trial-0000": "finished"}


@pytest.mark.parametrize("hurry", [True, False])
def test_a_running_trial_is_shipped_with_a_share_of_a_core_unless_a_user_waits(
    hurry: bool, folder: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "SHARE", 1e-6 if hurry else 0.02)
    trainer = Trainer(_new(folder, 0))
    trainer.log(1, loss=1.0)

    def work(run: RunDirectory) -> None:
        began = time.thread_time()
        while time.thread_time() - began < 0.02:
            pass

    tracker.ships = work
    began = time.monotonic()
    assert follower.follow(trainer.directory, "tensorboard", once=True, hurry=hurry)
    assert time.monotonic() - began > (0.0 if hurry else 0.9)


def test_a_follower_that_a_user_waits_for_says_why_its_try_failed(folder: Path, tracker: Tracker) -> None:
    trial = _trial(folder, 0)

    def fail(run: RunDirectory) -> None:
        raise ConnectionError("nobody is there")

    tracker.opens = fail
    assert not follower.follow(trial, "tensorboard", once=True, patience=0.0, hurry=True)
    assert follower.failing(trial) == {"tensorboard": "ConnectionError: nobody is there"}


def test_what_a_trainer_logs_before_its_end_is_shipped_with_the_end(folder: Path, tracker: Tracker) -> None:
    """A follower that was to ship what there was, and finds the trainer gone when it has."""
    trainer = Trainer(_new(folder, 0))
    trainer.log(1, loss=1.0)

    def end(run: RunDirectory) -> None:
        if run.trained_here:
            trainer.log(2, loss=1.0)
            trainer.end("finished")

    tracker.ships = end
    assert follower.follow(trainer.directory, "tensorboard", once=True)
    assert tracker.steps == {"trial-0000": [1, 2]}
    assert tracker.ended == {"trial-0000": "finished"}
    assert ledger.load(ledger.file_of(trainer.directory, "tensorboard")).concluded


def _new(folder: Path, number: int) -> RunDirectory:
    return make_run(folder.parent, f"trial-{number:04}", folder.name)


def _trial(folder: Path, number: int, status: str = "finished") -> RunDirectory:
    """A trial without a process."""
    trainer = Trainer(_new(folder, number))
    trainer.log(1, loss=1.0)
    trainer.end(status)
    return trainer.directory


def test_a_process_that_was_killed_during_a_search_has_a_successor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_SINKS", "tensorboard")
    monkeypatch.setattr("stoker.tracking.shipping._PAUSE", 0.0)
    trainer = Trainer(_new(folder, 0))
    trainer.log(1, loss=1.0)
    file = ledger.file_of(trainer.directory, "tensorboard")
    lock = storage.try_lock(folder / SWEEP_LOCK)
    assert lock is not None
    shipping = SweepShipping(folder, sinks.enabled())
    shipping.begin()
    until(lambda: ledger.load(file).offsets)
    killed = ledger.load(file).pid
    os.kill(killed, signal.SIGKILL)
    os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
    shipping.look_after()
    trainer.log(2, loss=1.0)
    until(lambda: ledger.load(file).pid != killed and follower.state(trainer.directory)[0].pending == 0)
    trainer.end("finished")
    os.close(lock)
    assert shipping.wait(DEADLINE)
    assert ledger.load(file).concluded


def test_a_process_that_is_killed_as_its_search_ends_has_a_successor_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_SINKS", "tensorboard")
    trial = _trial(folder, 0)
    lock = storage.try_lock(folder / SWEEP_LOCK)
    assert lock is not None
    shipping = SweepShipping(folder, sinks.enabled())
    shipping.begin()
    file = ledger.file_of(trial, "tensorboard")
    until(lambda: ledger.load(file).pid)
    shipping.finish()
    os.kill(ledger.load(file).pid, signal.SIGKILL)
    os.close(lock)
    assert shipping.wait(DEADLINE)
    assert ledger.load(file).concluded
