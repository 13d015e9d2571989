"""`stoker sweep --storage`: the study in PostgreSQL, which several controllers may share."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy

import servers
from commands import Command, Start
from support import LONG, loaded, until

RECIPE = str(Path(__file__).parent / "searched.py")
ASHA = ("--scheduler", "asha", "--least", "1", "--most", "9")

pytestmark = [
    pytest.mark.skipif(servers.postgres_binaries() is None, reason="PostgreSQL is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of SQLAlchemy
]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    binaries = servers.postgres_binaries()
    assert binaries is not None
    with servers.postgres(binaries) as url:
        yield url


def test_two_controllers_share_a_study(start: Start, stoker: Command, database: str, tmp_path: Path) -> None:
    """Neither trains the other's trials, and both judge by all of them."""
    go = tmp_path / "go"
    same = (
        "pause=2", f"until={go}", "--sampler", "random", "--trials", "12", *ASHA, "--storage", database,
        "--study", "shared",
    )  # fmt: skip
    given = ("sweep", RECIPE, "x=uniform(0, 1)", *same, "--json")
    processes = [start(*given, "--name", name) for name in ("here", "there")]
    runs = [tmp_path / "runs" / name for name in ("here", "there")]
    until(lambda: all(any(run.glob("trial-*")) for run in runs), *processes)  # both before it is over
    go.touch()
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=LONG)
        assert process.returncode == 0, err.decode()
        answers.append(json.loads(out.decode().strip().splitlines()[-1]))
    study = optuna.load_study(study_name="shared", storage=database)
    assert all(trial.state.is_finished() for trial in study.trials)
    assert len(study.trials) == 12
    own = [[trial["number"] for trial in answer["trials"]] for answer in answers]
    assert min(map(len, own)) >= 1
    assert sorted(own[0] + own[1]) == [trial.number for trial in study.trials]
    reached = [max(trial.intermediate_values) for trial in study.trials]
    assert reached.count(1) >= len(study.trials) // 2, "each of them alone would have promoted one in three"
    assert reached.count(9) >= 1
    for answer in answers:
        for trial in answer["trials"]:
            run = loaded(Path(trial["run"]))
            assert [step for step, _ in run.points["val_loss"].items()] == [s for s, _ in trial["values"]]
    report = stoker("report", "there", "--json")
    assert report.code == 0, report.err
    assert Path(report.answer["report"]).stat().st_size > 0
    other = stoker("sweep", RECIPE, "x=uniform(0, 2)", *same, "--name", "third")
    assert other.code == 2
    assert (
        "study shared exists with different settings: x: uniform(0.0, 1.0) -> uniform(0.0, 2.0)" in other.err
    )


def test_controllers_that_start_together_ask_once_for_what_is_to_be_tried(
    start: Start, database: str, tmp_path: Path
) -> None:
    given = (
        "sweep", RECIPE, "x=uniform(0, 1)", "--sampler", "random", "--trials", "4", "--try", "x=0.25",
        "--try", "x=0.75", "--storage", database, "--study", "together",
    )  # fmt: skip
    engine = sqlalchemy.create_engine(database)
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with engine.connect() as held, engine.connect() as seen:
        held.exec_driver_sql("SELECT pg_advisory_lock(7823846)")  # the one that controllers share
        processes = [start(*given, "--name", name) for name in ("one", "other")]
        until(lambda: seen.exec_driver_sql(waiting).scalar() == 2, *processes)
        assert not optuna.load_study(study_name="together", storage=database).trials
        held.exec_driver_sql("SELECT pg_advisory_unlock(7823846)")
    for process in processes:
        _, err = process.communicate(timeout=LONG)
        assert process.returncode == 0, err.decode()
    trials = optuna.load_study(study_name="together", storage=database).trials
    assert sorted(x for trial in trials if (x := trial.params["x"]) in (0.25, 0.75)) == [0.25, 0.75]
    assert len(trials) == 4


def test_a_study_of_the_same_name_is_not_joined_by_chance(
    stoker: Command, database: str, tmp_path: Path
) -> None:
    given = ("sweep", RECIPE, "x=uniform(0, 1)", "--trials", "1", "--storage", database, "--name", "own")
    assert stoker(*given).code == 0
    refused = stoker(*given, "--runs", "other")
    assert refused.code == 2
    assert "has 1 trial of a search in another folder: give --study own" in refused.err
    assert not (tmp_path / "other" / "own").exists()
    assert stoker(*given).code == 0, "the same folder goes on"


def test_a_password_among_the_urls_parameters_is_not_stored_and_is_asked_for_by_a_report(
    stoker: Command, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{database}?password=swordfish"  # which this server does not ask for
    given = ("sweep", RECIPE, "x=uniform(0, 1)", "--trials", "1", "--name", "secret")
    assert stoker(*given, "--storage", url).code == 0
    assert "swordfish" not in (tmp_path / "runs" / "secret" / "sweep.json").read_text()
    refused = stoker("report", "secret")
    assert refused.code == 2
    assert "password=[REDACTED]: set STOKER_STORAGE to its URL" in refused.err
    monkeypatch.setenv("STOKER_STORAGE", url)
    assert stoker("report", "secret").code == 0
    assert stoker(*given).code == 0, "the same search"


def test_a_controller_that_is_killed_goes_on_as_it_would_have(
    start: Start, stoker: Command, database: str, tmp_path: Path
) -> None:
    given = (
        "sweep", RECIPE, "x=uniform(0, 1)", "kind=[near, far]", "pause=0.05", "--trials", "8", *ASHA,
        "--storage", database, "--json",
    )  # fmt: skip
    whole = stoker(*given, "--name", "whole")
    assert whole.code == 0, whole.err
    for pause in (0.3, 1.1, 0.6):
        process = start(*given, "--name", "parts")
        _wait_for_a_trial(process, tmp_path / "runs" / "parts")
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    parts = stoker(*given, "--name", "parts")
    assert parts.code == 0, parts.err
    brief = [
        [(t["number"], t["state"], t["params"], t["values"]) for t in done.answer["trials"]]
        for done in (whole, parts)
    ]
    assert brief[0] == brief[1]


def test_a_database_that_does_not_answer_starts_nothing(stoker: Command, tmp_path: Path) -> None:
    url = f"postgresql+psycopg2://somebody:secret@127.0.0.1:{servers.free_port()}/none"
    done = stoker("sweep", RECIPE, "x=uniform(0, 1)", "--trials", "1", "--storage", url)
    assert done.code == 2, done.err
    assert "cannot be used" in done.err
    assert "secret" not in done.err
    assert not list(tmp_path.glob("runs/*/trial-*"))


def _wait_for_a_trial(process: subprocess.Popen[bytes], sweep: Path) -> None:
    until((sweep / "trial-0000").exists, process)
