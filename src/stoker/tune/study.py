"""The Optuna study of a search, in Optuna's own storage, which Optuna's dashboard can open too.

By default the storage is Optuna's journal, in a file next to the trials. Entries that belong together are
appended atomically, so that a killed search leaves no half-created trial. For each trial a new sampler is
created from the search's seed and the trial's number, so that a resumed search draws the same values as an
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import optuna
import orjson
from numpy.random import SeedSequence, default_rng  # numpy imports numpy.random lazily
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from stoker import redaction
from stoker.errors import BadInput, StokerError, nearest
from stoker.tune import promising, record
from stoker.tune.plan import Goal
from stoker.tune.space import Space
from stoker.tune.tables import Tables
from stoker.words import first_line

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("optuna").propagate = False

SAMPLERS = ("random", "grid", "qmc", "tpe", "gp", "cmaes", "nsga2", "nsga3")
STAGED = "staged"
SEVERAL = ("random", "grid", "qmc", "tpe", "nsga2", "nsga3", "gp")
"""Samplers that support several objectives."""
NAME = "sweep"
EARLIER = "earlier"
"""The attribute of trials copied from another search, with that search's name."""


_NAMED = "CONCAT('stoker.', MD5(DATABASE()))"  # names of locks are those of the server
_MYSQL = (f"SELECT GET_LOCK({_NAMED}, {365 * 24 * 3600})", f"SELECT RELEASE_LOCK({_NAMED})")
_LOCKS = {
    "postgresql": ("SELECT pg_advisory_lock(7823846)", "SELECT pg_advisory_unlock(7823846)"),
    "mysql": _MYSQL, "mariadb": _MYSQL,
}  # fmt: skip
"""The statements that take and release a lock shared by all controllers, by SQLAlchemy dialect."""


_SQLITE = re.compile(r"^(sqlite(?:\+\w+)?:///)(?!:memory:|file:)([^?]+)")
"""The URL of a file of SQLite, up to its options."""


class Kept(Protocol):
    """The storage of a study."""

    storage: BaseStorage

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Make the writes within this block atomic, if the storage supports it."""
        ...

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Let only one controller at a time execute this block, if there may be several."""
        ...

    def sync(self) -> None:
        """Flush what was written to disk."""
        ...


class Database:
    """Optuna's tables in a database, which several controllers may share.

    Each statement is durable on its own. If a controller died before it had drawn all values of a trial, the
    controller that takes the trial over draws the rest as it would have been (with `qmc`, of the next point).

    Args:
        new: create a file of SQLite and the tables if they do not exist.

    Raises:
        BadInput: the database cannot be used, or its driver is not installed.
    """

    def __init__(self, url: str, *, new: bool = True) -> None:
        file = _SQLITE.match(url := absolute(url))
        if not new and file is not None and not Path(file[2]).exists():
            raise BadInput(f"--storage {url}: there is no file {file[2]}")
        url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", url)  # the driver that stoker installs
        try:
            tables = _tables(url) if new else Tables(url, new=False)
        except ImportError as error:
            raise BadInput(
                f"--storage {record.shown(url)}: the database driver is not installed: {error}; for "
                "PostgreSQL: pip install psycopg2-binary"
            ) from error
        except Exception as error:  # of SQLAlchemy or of any driver
            said = first_line(error)
            raise BadInput(f"--storage {record.shown(url)} cannot be used: {said}") from error
        self.storage: BaseStorage = tables
        self._tables, self._engine = tables, tables.engine

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: each statement is written on its own."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let only one controller at a time execute this block, on PostgreSQL, MySQL and MariaDB.

        This uses a lock of the database, which is released when its connection ends, however the process
        ends. Raises StokerError if the database refuses it.
        """
        take, give = _LOCKS.get(self._engine.dialect.name, ("", ""))
        if not take:
            yield
            return
        from sqlalchemy.exc import DBAPIError

        connection = self._tables.patiently(lambda: self._locked(take))
        try:
            yield
        finally:
            with contextlib.suppress(DBAPIError):  # the connection is lost, and the lock with it
                connection.exec_driver_sql(give)
                connection.close()

    def _locked(self, take: str) -> Any:
        """A connection that holds the lock. Raises StokerError."""
        connection = self._engine.connect()
        try:
            if connection.exec_driver_sql(take).scalar() in (0, None):  # MySQL's answers without the lock
                raise StokerError(f"{self._engine.url.database}: the database gives no lock")
        except BaseException:
            connection.close()
            raise
        return connection

    def sync(self) -> None:
        """Does nothing: each statement is durable already."""


def absolute(url: str) -> str:
    """A database's URL that means the same in every folder."""
    return _SQLITE.sub(lambda found: found[1] + str(Path(found[2]).absolute()), url)


def _tables(url: str, tries: int = 5) -> Tables:
    """Optuna's tables, created if missing; retries if other controllers create them at the same time."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    try:
        return Tables(url)
    except (IntegrityError, ProgrammingError, OperationalError) as error:
        if tries == 1 or (isinstance(error, OperationalError) and "already exists" not in str(error)):
            raise
        time.sleep(0.5)
        return _tables(url, tries - 1)


class JournalFile(BaseJournalBackend):
    """Optuna's journal in a file, in the format of its `JournalFileBackend`: one JSON object per line.

    The kernel releases the file lock however the process that holds it ends, and `together` makes several
    entries one write. An appended entry survives the end of the process; it survives a power cut once `sync`
    has returned.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._logs: list[dict[str, Any]] = []
        self._read = 0  # bytes of the file that `_logs` contains
        self._held: list[dict[str, Any]] | None = None
        with self._locked():
            self._cut_torn_line()
        self._optunas = JournalStorage(self)
        self.storage: BaseStorage = self._optunas

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """The entries from the given number on."""
        self._take_in()
        held = self._held or []
        return [*self._logs[log_number_from:], *held[max(0, log_number_from - len(self._logs)) :]]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries in one write; within `together`, at the end of the block."""
        if self._held is not None:
            self._held += logs
            return
        lines = b"".join(_line(entry) for entry in logs)
        with self._locked():
            size = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, lines) < len(lines):  # the disk is full
                os.ftruncate(self._descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if size == self._read:  # no other process has appended: no need to read the file again
                self._logs += logs
                self._read += len(lines)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Append all entries of this block in one write, or none of them if an exception is raised."""
        self._take_in()
        self._held = []
        try:
            yield
            held, self._held = self._held, None
            if held:
                self.append_logs(held)
        except BaseException:
            self._held = None
            JournalStorage.__init__(self._optunas, self)  # reset: it has read entries that were not written
            raise

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: the only controller holds the lock of the sweep's folder."""
        return contextlib.nullcontext()

    def sync(self) -> None:
        """Flush the journal to disk."""
        os.fsync(self._descriptor)

    def _take_in(self) -> None:
        if self._held is not None:  # within `together`, entries of other processes are not read
            return
        size = os.fstat(self._descriptor).st_size
        if size <= self._read:
            return
        found = os.pread(self._descriptor, size - self._read, self._read)
        whole = found[: found.rfind(b"\n") + 1]
        self._logs += [json.loads(line) for line in whole.splitlines()]
        self._read += len(whole)

    def _cut_torn_line(self) -> None:
        """Remove an incomplete entry that a power cut left at the end."""
        size = os.fstat(self._descriptor).st_size
        content = os.pread(self._descriptor, size, 0)
        os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def _line(entry: dict[str, Any]) -> bytes:
    """An entry as a line of the journal, by orjson unless it may contain NaN, which orjson writes as null."""
    try:
        line = orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        line = b"null"
    if b"null" in line:
        return f"{json.dumps(entry, separators=(',', ':'))}\n".encode()
    return line


class _Learned(Study):
    """A study as samplers see it: a trial that is RUNNING and has values counts as ended.

    Otherwise samplers would learn nothing from trials that wait at a rung, as most of ASHA's do until the
    search ends.
    """

    @classmethod
    def of(cls, study: Study) -> _Learned:
        """Wrap a study."""
        learned = cls.__new__(cls)
        learned.__dict__ = study.__dict__
        return learned

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        found = [_as_far(trial) for trial in super()._get_trials(deepcopy, use_cache=use_cache)]
        return [trial for trial in found if states is None or trial.state in states]


def _as_far(trial: FrozenTrial) -> FrozenTrial:
    newest = trial.user_attrs.get(promising.NEWEST)
    if newest and trial.state in (TrialState.RUNNING, TrialState.PRUNED):
        ended = copy.copy(trial)
        ended.state, ended.values = TrialState.COMPLETE, newest["values"]  # pruned trials have none
        return ended
    if trial.state != TrialState.RUNNING or not trial.intermediate_values:
        return trial
    ended = copy.copy(trial)
    ended.state = TrialState.PRUNED
    return ended


class Seeded(BaseSampler):
    """Creates a new sampler for each trial, seeded by its number, so that a restart changes no draw.

    Args:
        make: creates a sampler from a seed and the trial's number.
        seed: the search's seed.
        learns: whether the draws depend on the results of other trials.
    """

    def __init__(self, make: Callable[[int, int], BaseSampler], seed: int, *, learns: bool = True) -> None:
        self._make, self._seed, self.learns = make, seed, learns
        self._of_open: dict[int, BaseSampler] = {}
        """The samplers of unfinished trials."""

    def _of(self, number: int) -> BaseSampler:
        if number not in self._of_open:
            drawn = SeedSequence([self._seed, number]).generate_state(1)
            self._of_open[number] = self._make(int(drawn[0]), number)
        return self._of_open[number]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """See BaseSampler, as for the others."""
        return self._of(trial.number).infer_relative_search_space(_Learned.of(study), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        """See BaseSampler."""
        return self._of(trial.number).sample_relative(_Learned.of(study), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """See BaseSampler."""
        return self._of(trial.number).sample_independent(
            _Learned.of(study), trial, param_name, param_distribution
        )

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """See BaseSampler."""
        self._of(trial.number).before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """See BaseSampler."""
        self._of(trial.number).after_trial(study, trial, state, values)
        del self._of_open[trial.number]


class _Point(BaseSampler):
    """Returns the values of one point of a grid."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """See BaseSampler, as for the others."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        """See BaseSampler."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """See BaseSampler."""
        return self._values[param_name]


def sampler(name: str, space: Space, seed: int, trials: int = 0) -> Seeded:
    """An Optuna sampler by its short name. Raises BadInput.

    Args:
        seed: the search's seed. What must be the same for all trials (the order of a grid, the scrambling of
            a sequence) depends on this seed only.
        trials: the number of planned trials; for `staged`, the first half of them are random.
    """
    samplers = optuna.samplers
    if name not in (*SAMPLERS, STAGED):
        raise BadInput(f"--sampler {name}: give one of {', '.join(SAMPLERS)}{nearest(name, SAMPLERS)}")
    if name == "grid":
        points = space.combinations()
        default_rng(seed).shuffle(points)
        return Seeded(lambda _, number: _Point(points[number % len(points)]), seed, learns=False)
    anew = samplers.RandomSampler()
    makers: dict[str, Callable[[int, int], BaseSampler]] = {
        "random": lambda drawn, _: _again(anew, drawn),
        "qmc": lambda drawn, _: samplers.QMCSampler(
            seed=seed,
            scramble=True,
            independent_sampler=samplers.RandomSampler(seed=drawn),
            warn_independent_sampling=False,
        ),
        "tpe": lambda drawn, _: samplers.TPESampler(
            seed=drawn, multivariate=True, group=True, constant_liar=True
        ),
        "gp": lambda drawn, _: samplers.GPSampler(seed=drawn),
        "cmaes": lambda drawn, _: samplers.CmaEsSampler(seed=drawn),
        "nsga2": lambda drawn, _: samplers.NSGAIISampler(seed=drawn),
        "nsga3": lambda drawn, _: samplers.NSGAIIISampler(seed=drawn),
        STAGED: lambda drawn, number: (
            _again(anew, drawn) if number < trials // 2 else promising.sampler(drawn, trials // 2)
        ),
    }
    return Seeded(makers[name], seed, learns=name != "random")


def _again(random: RandomSampler, seed: int) -> RandomSampler:
    """Reseed a sampler: equivalent to a new sampler, without the cost of creating its generator."""
    random._rng.rng.seed(seed)
    return random


def learns(study: Study) -> bool:
    """Whether the values of a study's next trial depend on the results of other trials."""
    return not isinstance(study.sampler, Seeded) or study.sampler.learns


def learn_from(study: Study, earlier: Study, name: str, space: Space) -> tuple[int, int]:
    """Copy the trials of an earlier search, called `name`, to a new study, as drawn from its space.

    Those that ended early or wait at a rung are copied too: after a search with a scheduler most have.

    Optuna's samplers go on drawing from the first distribution that a parameter had, or do not model one that
    had several.

    Returns:
        The number of trials that were copied, and of those that were not, having a value outside the space.
    """
    known = [
        trial
        for trial in map(_as_far, earlier.get_trials(deepcopy=False))
        if trial.state == TrialState.COMPLETE
        or (trial.state == TrialState.PRUNED and trial.intermediate_values)
    ]
    copied = 0
    for trial in known:
        drawn = _drawn_from(space, trial)
        if drawn is None:
            continue
        copied += 1
        study.add_trial(
            optuna.create_trial(
                state=trial.state,
                params=trial.params,
                distributions={**trial.distributions, **drawn},
                values=trial.values,
                intermediate_values=trial.intermediate_values,
                user_attrs={EARLIER: name},
            )
        )
    return copied, len(known) - copied


def _drawn_from(space: Space, trial: FrozenTrial) -> dict[str, BaseDistribution] | None:
    """The distributions of a space for a trial's values, by name; None if one of them is outside it."""
    found: dict[str, BaseDistribution] = {}
    for parameter in space.parameters:
        name = parameter.name
        if name not in trial.params:
            continue
        given = FixedTrial({name: trial.params[name]})
        with quiet():  # about a value outside
            parameter.domain.suggested(given, name)
        found[name] = given.distributions[name]
        if not found[name]._contains(found[name].to_internal_repr(trial.params[name])):
            return None
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Optuna's warnings about experimental features."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read(file: Path) -> Study:
    """The study in a journal, for reading only, also during the search."""
    return optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(file))))


def of(folder: Path) -> Study:
    """The study of the search in a folder, whatever its storage. Raises BadInput."""
    known = record.read(folder)
    url = known.get("storage", "")
    if not url:
        return read(folder / record.STUDY)
    if redaction.holds_redacted(url):
        url = os.environ.get("STOKER_STORAGE") or ""
    if not url:
        raise BadInput(f"{folder.name} is stored in {known['storage']}: set STOKER_STORAGE to its URL")
    return read_shared(url, known["study"])


def read_shared(url: str, name: str) -> Study:
    """The study of this name in a database. Raises BadInput."""
    try:
        return optuna.load_study(study_name=name, storage=Database(url, new=False).storage)
    except KeyError as error:
        raise BadInput(f"{record.shown(url)} has no study {name}") from error


def exists(kept: Kept, name: str) -> bool:
    """Whether there is a study of this name."""
    return name in optuna.get_all_study_names(kept.storage)


def opened(kept: Kept, made_by: BaseSampler, goals: Sequence[Goal], name: str = NAME) -> Study:
    """The study of this name, created if it does not exist."""
    if exists(kept, name):
        return optuna.load_study(study_name=name, storage=kept.storage, sampler=made_by)
    directions = [StudyDirection.MINIMIZE if goal == "min" else StudyDirection.MAXIMIZE for goal in goals]
    with kept.together():  # if two processes create it at once, one loads it
        return optuna.create_study(
            study_name=name, storage=kept.storage, sampler=made_by, directions=directions, load_if_exists=True
        )
