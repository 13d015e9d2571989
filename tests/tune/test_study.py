"""Optuna's journal in a file, which Optuna reads; samplers that depend on no process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState
from stoker import BadInput
from stoker.tune import samplers, stores
from stoker.tune import study as studies
from stoker.tune.entries import Entries
from stoker.tune.peers import Peers
from stoker.tune.plan import SHARE, Objective
from stoker.tune.space_reading import parse

from support import SOAK


def opened(folder: Path, sampler: str = "random", seed: int = 0) -> tuple[stores.JournalFile, optuna.Study]:
    file = stores.JournalFile(folder / "study.journal")
    return file, studies.opened(file, samplers.make(sampler, SPACE, seed), ["min"])


@dataclass(frozen=True)
class Searched:
    x: float = 0.0
    layers: int = 1
    data_share: float = 1.0


SPACE = parse(["x=uniform(0, 1)", "layers=int(1, 3)"], Searched)


@dataclass(frozen=True)
class Three:
    x: int = 1
    y: int = 1
    z: int = 1


def draw(file: stores.JournalFile, study: optuna.Study) -> dict[str, float]:
    with studies.quiet(), file.together():
        trial = study.ask()
        trial.suggest_float("x", 0.0, 1.0)
        trial.suggest_int("layers", 1, 3)
    study.tell(trial, (trial.params["x"] - 0.3) ** 2)
    return trial.params


def test_optuna_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    file, study = opened(tmp_path)
    drawn = [draw(file, study) for _ in range(5)]
    theirs = optuna.load_study(
        study_name=studies.NAME,
        storage=JournalStorage(JournalFileBackend(str(tmp_path / "study.journal"))),
    )
    assert [trial.params for trial in theirs.trials] == drawn
    theirs.add_trial(optuna.trial.create_trial(value=1.5))
    assert [trial.value for trial in study.trials][-1] == 1.5
    assert study.trials[-1].number == 5


def test_what_belongs_together_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """A process that is killed between two entries of one question leaves none of them."""
    file, study = opened(tmp_path)
    draw(file, study)
    before = (tmp_path / "study.journal").read_bytes()
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import optuna\n"
        "from stoker.tune import stores\n"
        "from stoker.tune import study as studies\n"
        "file = stores.JournalFile(Path(sys.argv[1]))\n"
        "study = studies.opened(file, None, ['min'])\n"
        "with file.together():\n"
        "    study.ask().suggest_float('x', 0.0, 1.0)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "study.journal"], check=False)
    assert done.returncode == -9
    assert (tmp_path / "study.journal").read_bytes() == before


def test_what_raises_halfway_leaves_nothing_and_the_study_goes_on(tmp_path: Path) -> None:
    file, study = opened(tmp_path)
    draw(file, study)
    before = (tmp_path / "study.journal").read_bytes()
    with pytest.raises(ValueError, match="choices"), file.together():
        study.ask().suggest_categorical("x", [])
    assert (tmp_path / "study.journal").read_bytes() == before
    drawn = draw(file, study)
    assert [trial.params for trial in study.trials][1:] == [drawn]
    assert [trial.params for trial in opened(tmp_path)[1].trials][1:] == [drawn]


def test_an_entry_that_a_power_cut_has_torn_is_cut_off(tmp_path: Path) -> None:
    file, study = opened(tmp_path)
    draw(file, study)
    whole = (tmp_path / "study.journal").read_bytes()
    (tmp_path / "study.journal").write_bytes(whole + b'{"op_code":4,"tri')
    file, study = opened(tmp_path)
    assert (tmp_path / "study.journal").read_bytes() == whole
    draw(file, study)
    assert len(study.trials) == 2


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Optuna's own lock is a link that stays, and is waited for."""
    code = (
        "import fcntl, os, sys\n"
        "d = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(d, fcntl.LOCK_EX)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "study.journal"], check=False)
    file, study = opened(tmp_path)
    draw(file, study)


@pytest.mark.parametrize("name", ["random", "qmc", "tpe", "gp", "cmaes", "nsga2"])
def test_a_study_that_is_opened_again_goes_on_as_it_would_have(name: str, tmp_path: Path) -> None:
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    file, study = opened(tmp_path / "whole", name)
    whole = [draw(file, study) for _ in range(14)]
    parts = []
    for _ in range(14):
        file, study = opened(tmp_path / "parts", name)
        parts.append(draw(file, study))
    assert parts == whole
    assert len({tuple(params.items()) for params in whole}) > 7
    (tmp_path / "other").mkdir()
    file, study = opened(tmp_path / "other", name, seed=1)
    assert [draw(file, study) for _ in range(3)] != whole[:3]


SAMPLERS = ("random", "tpe", "gp", "cmaes", "nsga2", "grid")
EVERY = [(sampler, drawn) for sampler in SAMPLERS for drawn in (1, 2)]
FEW = [(sampler, 1 + number % 2) for number, sampler in enumerate(SAMPLERS)]


@pytest.mark.soak
@pytest.mark.parametrize(("sampler", "drawn_before"), EVERY if SOAK else FEW)
def test_the_rest_of_a_trial_is_drawn_as_it_would_have_been(
    sampler: str, drawn_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller is killed between two values of a trial, which a database keeps one by one."""
    numbers = ", ".join(map(str, range(30)))
    space = parse([f"{name}=[{numbers}]" for name in "xyz"], Three)

    def entries(name: str) -> tuple[optuna.Study, Entries]:
        kept = stores.Database(f"sqlite:///{tmp_path / name}")
        study = studies.opened(kept, samplers.make(sampler, space, 0), ["min"])
        plan: Any = None  # a search's, which drawing does not need
        return study, Entries(plan, space, study, kept, None)

    _, whole = entries("whole")
    expected = [whole.ask(lambda: 0) for _ in range(4)]
    assert expected[3] is not None
    study, killed = entries("killed")
    for _ in range(3):
        killed.ask(lambda: 0)
    write, left = study._storage.set_trial_param, [None] * drawn_before

    def write_some(*given: Any) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(*given)

    monkeypatch.setattr(study._storage, "set_trial_param", write_some)
    with pytest.raises(KeyboardInterrupt):
        killed.ask(lambda: 0)
    study, again = entries("killed")
    assert len(study.trials[3].params) == drawn_before
    assert again.take_up(study.trials[3]).params == expected[3].params


def test_another_controller_knows_values_at_shares_of_the_data_as_they_are(tmp_path: Path) -> None:
    space, goal = parse(["x=[1, 2]"], Three), Objective("loss", "min")
    plan: Any = SimpleNamespace(objectives=[goal], unit=SHARE, trials=1, folder=tmp_path)
    kept = stores.Database(f"sqlite:///{tmp_path / 'study.db'}")
    study = studies.opened(kept, samplers.make("random", space, 0), ["min"])
    one, other = (Peers(study, name, goal) for name in "ab")
    entries = Entries(plan, space, study, kept, one)
    trial = entries.ask(lambda: 0)
    assert trial is not None
    trial.share, trial.values = 100 / 9, {100 / 27: 1.0, 100 / 9: 0.5}
    entries.publish(trial, paused=True)
    other.look_again()
    assert other.known()[trial.number].values == trial.values
    assert other.trials[0].user_attrs["sweep"] == tmp_path.name  # where its run is


def searched(folder: Path, space: Any, sampler: str, earlier: optuna.Study | None = None) -> optuna.Study:
    """A search of 12 trials for x = 7, after an earlier one if there is any."""
    folder.mkdir()
    file = stores.JournalFile(folder / "study.journal")
    study = studies.opened(file, samplers.make(sampler, space, 0), ["min"])
    if earlier is not None:
        studies.learn_from(study, earlier, "earlier", space)
    for _ in range(12):
        with studies.quiet():
            trial = study.ask()
            study.tell(trial, abs(space.suggest(trial)["x"] - 7))
    return study


WIDER = [(sampler, wider) for sampler in ("tpe", "gp") for wider in ("uniform(0, 10)", "log(0.001, 10)")]


@pytest.mark.soak
@pytest.mark.parametrize(("sampler", "wider"), WIDER if SOAK else WIDER[1:3])
def test_a_wider_range_than_an_earlier_search_had_is_searched_as_a_whole(
    sampler: str, wider: str, tmp_path: Path
) -> None:
    earlier = searched(tmp_path / "a", parse(["x=uniform(0.01, 1)", "layers=int(1, 3)"], Searched), "random")
    space: Any = parse([f"x={wider}", "layers=int(1, 3)"], Searched)
    study = searched(tmp_path / "b", space, sampler, earlier)
    drawn = [trial.params["x"] for trial in study.trials[12:]]
    assert min(abs(x - 7) for x in drawn) < 2, drawn
    assert len({str(trial.distributions["x"]) for trial in study.trials}) == 1, "or no sampler models it"


def test_a_trial_with_a_value_outside_the_new_range_is_not_learnt_from(tmp_path: Path) -> None:
    earlier = searched(tmp_path / "a", SPACE, "random")
    (tmp_path / "b").mkdir()
    _, study = opened(tmp_path / "b")
    space: Any = parse(["x=uniform(0.2, 0.5)", "layers=int(1, 3)"], Searched)
    inside = [x for trial in earlier.trials if 0.2 <= (x := trial.params["x"]) <= 0.5]
    assert 0 < len(inside) < 12
    assert studies.learn_from(study, earlier, "earlier", space) == (len(inside), 12 - len(inside))
    assert [trial.params["x"] for trial in study.trials] == inside


def test_trials_that_ended_early_or_wait_at_a_rung_are_learnt_from(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    file, earlier = opened(tmp_path / "a")
    for told in (TrialState.COMPLETE, TrialState.PRUNED, None, TrialState.FAIL):
        with studies.quiet(), file.together():
            trial = earlier.ask()
            SPACE.suggest(trial)
            trial.report(0.5, step=3)
        if told is not None:
            earlier.tell(trial, 0.5 if told == TrialState.COMPLETE else None, state=told)
    earlier.ask()  # one that has reported nothing
    _, study = opened(tmp_path / "b")
    assert studies.learn_from(study, earlier, "earlier", SPACE) == (3, 0)
    found = [(trial.state, trial.params, trial.intermediate_values) for trial in study.trials]
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED)
    assert found == [(s, trial.params, {3: 0.5}) for s, trial in zip(states, earlier.trials, strict=False)]


def test_a_sampler_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="did you mean 'random'"):
        samplers.make("randon", SPACE, 0)


def test_an_append_is_with_the_system_at_once(tmp_path: Path) -> None:
    file, study = opened(tmp_path)
    size = (tmp_path / "study.journal").stat().st_size
    study.set_user_attr("a", 1)
    assert (tmp_path / "study.journal").stat().st_size > size
    file.sync()
