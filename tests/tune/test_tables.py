"""A study in a PostgreSQL that is away for a while."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import optuna
import psycopg2
import pytest
import sqlalchemy
from optuna.trial import TrialState
from stoker.tune import peers, samplers, schedulers, stores, tables
from stoker.tune import study as studies
from stoker.tune.peers import Peers
from stoker.tune.plan import Objective, Plan
from stoker.tune.search import Search
from stoker.tune.tables import DatabaseAway
from stoker.tune.trial import Ended, Report, TrialJob
from test_study import SPACE

import servers
from support import until

pytestmark = [
    pytest.mark.skipif(servers.postgres_binaries() is None, reason="PostgreSQL is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of SQLAlchemy
]
OBJECTIVE = Objective("val_loss", "min")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    binaries = servers.postgres_binaries()
    assert binaries is not None
    with servers.postgres(binaries) as url:
        yield url


@pytest.fixture
def kept(database: str, monkeypatch: pytest.MonkeyPatch) -> stores.Database:
    monkeypatch.setattr(tables, "_FIRST", 0.05)
    monkeypatch.setattr(tables, "_LONGEST", 0.05)
    return stores.Database(database)


AWAY = "the database of the study does not answer"


@contextlib.contextmanager
def away(url: str, caplog: pytest.LogCaptureFixture | None = None) -> Iterator[None]:
    """The database ends its connections, and takes no others within the block.

    Args:
        caplog: only until the log says once more that it is away, within the block.
    """
    admin = sqlalchemy.create_engine(url.replace("/mlflow", "/postgres"), isolation_level="AUTOCOMMIT")
    left = threading.Event()

    def back() -> None:
        with admin.connect() as there:
            there.exec_driver_sql("ALTER DATABASE mlflow ALLOW_CONNECTIONS true")

    def back_once_it_is_missed(said: pytest.LogCaptureFixture, before: int) -> None:
        until(lambda: left.is_set() or said.text.count(AWAY) > before)
        back()

    with admin.connect() as there:
        there.exec_driver_sql("ALTER DATABASE mlflow ALLOW_CONNECTIONS false")
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'mlflow'"
        until(lambda: not there.exec_driver_sql(ended).all())
    waits = [] if caplog is None else [threading.Thread(target=back_once_it_is_missed, args=(
        caplog, caplog.text.count(AWAY)
    ))]  # fmt: skip
    for thread in waits:
        thread.start()
    try:
        yield
    finally:
        left.set()
        for thread in waits:
            thread.join()
        back()


def test_what_is_asked_written_and_told_waits_for_the_database(
    database: str, kept: stores.Database, caplog: pytest.LogCaptureFixture
) -> None:
    study = studies.opened(kept, samplers.make("random", SPACE, 0), ["min"], "waits")
    with away(database, caplog), kept.alone():
        trial = study.ask()
    with kept.alone():
        trial.suggest_float("x", 0.0, 1.0)
        with away(database, caplog):
            trial.report(1.0, 1)
    with away(database, caplog):
        study.tell(trial, 1.0)
    with kept.alone(), away(database):
        pass  # the lock is lost with its connection
    (found,) = optuna.load_study(study_name="waits", storage=database).trials
    assert (found.state, found.intermediate_values) == (TrialState.COMPLETE, {1: 1.0})
    assert caplog.text.count(AWAY) == 3, "once each time"


def test_what_was_written_before_the_connection_was_lost_is_written_once(
    kept: stores.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody heard that it was."""
    study = studies.opened(kept, samplers.make("random", SPACE, 0), ["min"], "once")
    study.enqueue_trial({"x": 0.5})
    dialect, lose = kept._engine.dialect, [False]
    commit = dialect.do_commit

    def lost(connection: object) -> None:
        commit(connection)
        if lose[0]:
            lose[0] = False
            raise psycopg2.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", lost)
    for number in range(3):
        lose[0] = True
        trial = study.ask()
        assert trial.number == number
        assert (trial.suggest_float("x", 0.0, 1.0) == 0.5) == (number == 0)
        lose[0] = True
        study.tell(trial, 1.0)
        assert not lose[0]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3


def test_controllers_that_could_write_no_heartbeat_are_not_dead(
    database: str, kept: stores.Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = studies.opened(kept, samplers.make("random", SPACE, 0), ["min"], "beats")
    later = 0.0
    clock = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + later)
    monkeypatch.setattr(peers, "time", clock)
    one, other = (Peers(study, name, OBJECTIVE) for name in ("one", "other"))
    other.claim(study.ask())
    one.look_again()
    assert one.running
    with away(database, caplog):
        later += 2 * peers._GONE
        one.look_again()
    assert one.running

    def is_gone() -> bool:
        nonlocal later
        later += peers._AWAY / 2
        one.look_again()
        return not one.running

    until(is_gone)


class Waiting:
    """A trial that waits for an answer to its first report when the database goes away, and then saves."""

    def __init__(self, leaves: contextlib.ExitStack, url: str) -> None:
        self._leaves, self._url = leaves, url
        self.running: list[int] = []
        self.told: list[str] = []

    free = property(lambda self: not self.running)

    def prepare(self) -> None:
        pass

    close = prepare

    def start(self, job: TrialJob) -> None:
        self.running.append(job.number)

    def wait(self, timeout: float | None = None) -> list[Report | Ended]:
        if not self.told:
            self._leaves.enter_context(away(self._url))
            return [Report(0, 1, 1.0)]
        assert self.told == ["stop", "continue"]
        self.running.clear()
        return [Ended(0, "preempted")]

    def answer(self, number: int, decision: str, *, save: bool) -> None:
        self.told.append(decision)

    def stop(self) -> None:
        self.told.append("stop")

    def kill(self) -> None:
        assert not self.running


def test_trials_save_where_the_database_stays_away(
    database: str, kept: stores.Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PATIENCE", 0.3)
    study = studies.opened(kept, samplers.make("random", SPACE, 0), ["min"], "stays")
    plan = Plan(
        folder=tmp_path,
        recipe="recipe",
        config=SPACE.config,
        objectives=(OBJECTIVE,),
        trials=2,
        provenance=tmp_path / "provenance",
    )
    with contextlib.ExitStack() as stack:
        workers = Waiting(stack, database)
        found = Search(
            plan, SPACE, study, kept, schedulers.make("median"), workers, Peers(study, "one", OBJECTIVE)
        )
        with pytest.raises(
            DatabaseAway, match=r"does not answer .*: run the same command again once it does"
        ):
            found.run()
    assert workers.told == ["stop", "continue"]
    found = Search(
        plan, SPACE, study, kept, schedulers.make("median"), workers, Peers(study, "one", OBJECTIVE)
    )
    assert [trial.resumes for trial in found.trials.values()] == [True]
