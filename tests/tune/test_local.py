"""The processes of trials: who gets which GPU, who takes whom along."""

from __future__ import annotations

import dataclasses
import errno
import functools
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from stoker.errors import BadInput
from stoker.tune import local
from stoker.tune.local import Over, Workers, outcome
from stoker.tune.trial import Began, Ended, Link, Report, TrialJob

from support import LONG, until


@pytest.fixture
def all_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial counts as short, however slow this machine is."""
    monkeypatch.setattr(local, "_SHORT", LONG)


def job(number: int) -> TrialJob:
    return TrialJob(
        number=number,
        recipe="none",
        values={},
        sources={},
        runs=Path("runs"),
        sweep="sweep",
        run=f"trial-{number}",
        metrics=("val_loss",),
        unit="step",
        provenance=Path(),
    )


def sees(job: TrialJob, link: Link) -> dict[str, Any]:
    """Says which GPUs it may use, and what it is told."""
    link.hold(step=1, value=float(job.number), per_step=1.0)
    answer = link.ask("reports")
    time.sleep(0.2)
    return {"status": "finished", "logged": [os.environ.get("CUDA_VISIBLE_DEVICES", ""), answer["decision"]]}


def one_of_two_fails(job: TrialJob, link: Link) -> dict[str, Any]:
    """Rank 1 fails while rank 0 waits for it."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("rank 1 cannot do it")
    time.sleep(600)
    return {"status": "finished"}


def allocates(job: TrialJob, link: Link) -> dict[str, Any]:
    raise MemoryError("no room")


def searched(workers: Workers, jobs: int) -> list[Ended]:
    """Run so many jobs to their end."""
    ended: list[Ended] = []
    waiting = list(range(jobs))
    while waiting or workers.running:
        while waiting and workers.free:
            workers.start(job(waiting.pop(0)))
        for happened in workers.wait(LONG):
            if isinstance(happened, Report):
                assert happened.value == happened.number
                workers.answer(happened.number, "continue", save=False)
            elif isinstance(happened, Ended):
                ended.append(happened)
    return ended


def test_gpus_are_handed_out_and_given_back() -> None:
    workers = Workers(sees, parallel=2, gpus=["3", "5"])
    ended = searched(workers, 5)
    assert sorted(e.number for e in ended) == list(range(5))
    assert {e.status for e in ended} == {"finished"}
    assert {e.logged for e in ended} == {("3", "continue"), ("5", "continue")}


def test_no_more_trials_run_than_there_are_gpus() -> None:
    workers = Workers(sees, parallel=4, ranks=2, gpus=["0", "1", "2"])
    workers.start(job(0))
    assert not workers.free
    workers.kill()
    ended: list[Report | Ended] = []
    while workers.running:
        ended += workers.wait(LONG)
    assert [type(e) for e in ended if not isinstance(e, Report)] == [Ended]
    assert workers.free


def test_a_rank_that_fails_takes_the_others_with_it() -> None:
    workers = Workers(one_of_two_fails, parallel=1, ranks=2)
    begun = time.monotonic()
    (ended,) = searched(workers, 1)
    assert time.monotonic() - begun < LONG
    assert (ended.status, ended.error) == ("failed", "RuntimeError: rank 1 cannot do it")
    assert "one_of_two_fails" in ended.trace


def test_a_full_disk_is_what_a_trial_says_whichever_rank_it_stopped() -> None:
    error = "OSError: [Errno 28] No space left on device: 'step-10'"
    first = Over(
        {"status": "failed", "error": "RuntimeError: rank 1 is gone", "trace": "", "refused": False}, 0
    )
    second = Over({"status": "failed", "error": error, "trace": "", "refused": False}, 0)
    assert outcome(0, first, [first, second]).error == error


def no_disk_to_begin_on(job: TrialJob, link: Link) -> dict[str, Any]:
    try:
        raise OSError(errno.EROFS, "Read-only file system", "runs")
    except OSError as error:
        raise BadInput("cannot write the run to runs") from error


def test_a_run_that_the_disk_does_not_let_begin_is_not_refused() -> None:
    (ended,) = searched(Workers(no_disk_to_begin_on, parallel=1), 1)
    assert (ended.error, ended.refused) == ("OSError: [Errno 30] Read-only file system: 'runs'", False)


@pytest.mark.parametrize("parallel", [1, 2])
def test_memory_that_runs_out_is_one_failure(parallel: int) -> None:
    ended = searched(Workers(allocates, parallel=parallel), 2)
    assert [e.status for e in ended] == ["failed", "failed"]
    assert "MemoryError: no room" in ended[0].error


def says_who(job: TrialJob, link: Link) -> dict[str, Any]:
    """Says who it is; the third trial holds on to 200 MB, the fifth fails, the seventh is killed."""
    if job.number == 2:
        HELD.append(b"x" * 200_000_000)
    if job.number == 4:
        raise RuntimeError("no")
    if job.number == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"status": "finished", "logged": [str(os.getpid())]}


HELD: list[bytes] = []


def test_a_process_that_is_used_again_is_given_up_once_it_has_grown_or_failed() -> None:
    workers = Workers(says_who, parallel=1, reuse=True)
    ended = searched(workers, 9)
    assert [e.status for e in ended] == ["finished"] * 4 + ["failed", "finished", "killed"] + ["finished"] * 2
    who = [e.logged[0] if e.logged else None for e in ended]
    assert who[0] == who[1] == who[2]
    assert who[3] != who[2], "it had grown"
    assert who[5] != who[3], "it had failed"
    assert who[7] == who[8] != who[5]
    (process,) = [psutil.Process(int(who[8] or 0))]
    workers.close()
    process.wait(LONG)


def handed_over(workers: Workers, jobs: int) -> list[Ended | Began]:
    """Run so many jobs to their end, all but the first two in the process's hands before it is their turn."""
    workers.start(job(0))
    assert not workers.takes_ahead, "nobody knows yet how long trials take"
    happened = ends(workers)
    workers.start(job(1))
    given = 2
    while workers.running:
        while given < jobs and workers.takes_ahead:
            workers.ahead(job(given))
            given += 1
        happened += ends(workers)
    return happened


def ends(workers: Workers) -> list[Ended | Began]:
    """What happened, but for reports."""
    return [one for one in workers.wait(LONG) if not isinstance(one, Report)]


@pytest.mark.usefixtures("all_short")
def test_a_process_goes_on_with_the_trial_in_its_hands_and_another_one_does_where_it_ends() -> None:
    workers = Workers(says_who, parallel=1, reuse=True)
    workers.prepare()
    happened = handed_over(workers, 9)
    ended = [one for one in happened if isinstance(one, Ended)]
    assert [one.number for one in happened] == [0, 1, *[number for number in range(2, 9) for _ in "be"]]
    assert [type(one) for one in happened] == [Ended, Ended, *[Began, Ended] * 7]
    assert [e.status for e in ended] == ["finished"] * 4 + ["failed", "finished", "killed"] + ["finished"] * 2
    who = [e.logged[0] if e.logged else None for e in ended]
    assert who[0] == who[1] == who[2]
    assert who[7] == who[8]
    assert len({who[2], who[3], who[5], who[7]}) == 4, "it had grown, failed, been killed"
    assert workers.free
    assert not workers.takes_ahead
    workers.close()


def goes_with_the_third(job: TrialJob, link: Link) -> dict[str, Any]:
    """Trains three at once, of which the last one fails, and notes each."""
    with (job.runs / "begun").open("a") as file:
        file.write(f"{job.number}\n")
    if job.number == 3:
        raise RuntimeError("no")
    link.hold(step=1, value=float(job.number), per_step=1.0)
    return {"status": "finished"}


@pytest.mark.usefixtures("all_short")
def test_what_a_process_had_done_when_it_ended_is_heard_and_not_done_again(tmp_path: Path) -> None:
    workers = Workers(goes_with_the_third, parallel=1, reuse=True)
    workers.prepare()
    workers.start(dataclasses.replace(job(0), runs=tmp_path))
    found: list[Any] = workers.wait(LONG)
    workers.start(dataclasses.replace(job(1), runs=tmp_path))
    for number in (2, 3):
        workers.ahead(dataclasses.replace(job(number), runs=tmp_path))
    until(lambda: not multiprocessing.active_children())  # it has ended, and all is to be heard now
    while workers.running:
        found += workers.wait(LONG)
    assert (tmp_path / "begun").read_text().split() == ["0", "1", "2", "3"]
    said = [(type(one).__name__, one.number) for one in found]
    assert said == [
        ("Report", 0), ("Ended", 0), ("Report", 1), ("Ended", 1), ("Began", 2), ("Report", 2), ("Ended", 2),
        ("Began", 3), ("Ended", 3),
    ]  # fmt: skip
    assert [one.status for one in found if isinstance(one, Ended)] == ["finished"] * 3 + ["failed"]
    workers.close()


def reports_late(job: TrialJob, link: Link) -> dict[str, Any]:
    """What it says last goes with the word that it is over, and the next one begins at once."""
    link.hold(step=1, value=float(job.number), per_step=1.0)
    return {"status": "finished"}


@pytest.mark.usefixtures("all_short")
def test_what_a_trial_reports_is_never_taken_for_the_next_ones() -> None:
    workers = Workers(reports_late, parallel=1, reuse=True)
    workers.prepare()
    workers.start(job(0))
    found: list[Any] = workers.wait(LONG)
    workers.start(job(1))
    given = 2
    while workers.running:
        while given < 50 and workers.takes_ahead:
            workers.ahead(job(given))
            given += 1
        if given % 5:
            time.sleep(0.001)  # both may have spoken by then
        found += workers.wait(LONG)
    assert [one.number for one in found if isinstance(one, Report)] == list(range(50))
    assert all(one.value == one.number for one in found if isinstance(one, Report))
    workers.close()


def waits_for_its_end(job: TrialJob, link: Link) -> dict[str, Any]:
    """Ends as a run does that is told to stop; but the first one at once."""
    if job.number == 0:
        return {"status": "finished"}
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    link.hold(step=1, value=1.0, per_step=1.0)
    link.send_held()
    while not told:
        time.sleep(0.01)
    return {"status": "preempted"}


def behind_a_short_one(parallel: int) -> Workers:
    """One trial has ended at once, and the next one waits for its end."""
    workers = Workers(waits_for_its_end, parallel=parallel, reuse=True)
    workers.prepare()
    workers.start(job(0))
    assert [type(one) for one in workers.wait(LONG)] == [Ended]
    workers.start(job(1))
    return workers


@pytest.mark.usefixtures("all_short")
def test_what_is_in_a_processs_hands_is_not_begun_once_it_was_told_to_stop() -> None:
    workers = behind_a_short_one(parallel=1)
    workers.ahead(job(2))
    workers.ahead(job(3))
    assert not workers.takes_ahead
    assert isinstance(workers.wait(LONG)[0], Report)
    workers.stop()
    found: list[Any] = []
    while workers.running:
        found += workers.wait(LONG)
    assert [(one.number, one.status) for one in found] == [(1, "preempted")]
    workers.close()


@pytest.mark.usefixtures("all_short")
def test_nothing_is_put_behind_a_trial_that_takes_long() -> None:
    workers = behind_a_short_one(parallel=2)
    assert workers.takes_ahead
    assert isinstance(workers.wait(LONG)[0], Report)
    workers._trials[1].begun -= LONG
    assert not workers.takes_ahead, "it has run for longer than a short one"
    workers.start(job(2))
    assert workers.takes_ahead, "behind the other one"
    workers.stop()
    while workers.running:
        workers.wait(LONG)
    workers.close()


def test_a_process_that_waits_for_its_first_trial_is_ready_for_it(tmp_path: Path) -> None:
    workers = Workers(says_who, parallel=2, reuse=True, ready=functools.partial(notes_who, tmp_path))
    workers.prepare()
    ready = {file.name for file in tmp_path.iterdir()}
    assert len(ready) == 2
    assert {one.logged[0] for one in searched(workers, 2)} <= ready
    workers.close()


def notes_who(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def test_by_default_every_trial_has_a_process_of_its_own() -> None:
    workers = Workers(says_who, parallel=1)
    ended = searched(workers, 2)
    assert ended[0].logged != ended[1].logged
