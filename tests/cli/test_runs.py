from __future__ import annotations

import csv
import io
import json
import logging
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from rich.console import Console
from stoker import storage
from stoker.cli.verbs import runs
from stoker.errors import BadInput
from stoker.report import terminal
from stoker.report.terminal import Listed
from stoker.run import journal, view
from stoker.run.directory import SWEEP, RunDirectory
from typer.testing import CliRunner, Result

Cli = Callable[..., Result]

LOSSES = {step: 1 / (step + 2) for step in range(1, 8)}


def _create(path: Path, run_id: str, experiment: str = "llm", **config: Any) -> RunDirectory:
    directory = RunDirectory(path / "runs" / experiment / run_id)
    directory.create({
        "id": run_id, "experiment": experiment, "command": ["/bin/stoker", "train", "llm", "lr=0.5"],
        "recipe": {"name": "llm"}, "config": {"batch_size": 8, "lr": 0.5, **config},
        "sources": {"batch_size": "default", "lr": "command line"}, "seed": 0,
        "code": {"commit": "0123456789abcdef", "branch": "main", "dirty": True},
    })  # fmt: skip
    return directory


def _log(
    directory: RunDirectory, *events: tuple[str, dict[str, Any]], began: float = 1000.0, **more: Any
) -> None:
    """An attempt in the journal, with a second between its events."""
    _, writer = journal.start_attempt(directory.journal)
    writer.append("attempt_started", time=began, pid=1, host="here", drift={}, **more)
    for i, (kind, fields) in enumerate(events):
        writer.append(kind, time=began + i + 1, **fields)
    writer.close()


def _metrics(step: int, **values: float) -> tuple[str, dict[str, Any]]:
    return "metrics", {"step": step, "values": journal.encode_values(values)}


def _ended(status: str, error: str | None = None) -> tuple[str, dict[str, Any]]:
    return "attempt_ended", {"status": status, "error": error}


@pytest.fixture
def killed_twice(tmp_path: Path) -> RunDirectory:
    """A run killed at steps 4 and 6, which went on from checkpoints before them, to step 7."""
    directory = _create(tmp_path, "a")
    _log(directory, ("plan", {"total_steps": 7}), *(_metrics(s, loss=LOSSES[s]) for s in (1, 2, 3)),
         _metrics(4, loss=99.0))  # fmt: skip
    passed_over = {"step": 3, "passed_over": ["step-00000004: it has no manifest"]}
    _log(directory, ("resumed", passed_over), _metrics(4, loss=LOSSES[4]),
         _metrics(5, loss=99.0), _metrics(6, loss=99.0), began=2000)  # fmt: skip
    _log(directory, ("resumed", {"step": 4, "passed_over": []}),
         *(_metrics(s, loss=LOSSES[s]) for s in (5, 6, 7)),
         _metrics(5, val_loss=math.nan), _metrics(7, val_loss=-math.inf), _ended("finished"),
         began=3000)  # fmt: skip
    return directory


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `stoker runs ARGUMENTS` in the test's folder; errors come through as they are."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(runs.app, list(arguments), standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result

    return run


def _read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_long_value_is_shortened_for_people_and_whole_for_programs(cli: Cli, tmp_path: Path) -> None:
    long = "begin " + "x" * 9000 + " end"
    for name, value in (("a", long), ("b", long.replace("begin", "other"))):
        run = _create(tmp_path, name, prompt=value)
        said = (("params", {"values": {"found": value}}), ("tags", {"tags": {"tag": value}}))
        _log(run, *said, _metrics(1, loss=1.0))
    for arguments in (("show", "a"), ("compare", "a", "b"), ("list",)):
        lines = cli(*arguments).stdout.splitlines()
        assert max(map(len, lines)) < 400, arguments
        assert all(line == line.rstrip() for line in lines), arguments
    shown = [line for line in cli("show", "a").stdout.splitlines() if "begin xxx" in line]
    assert [line.split()[0] for line in shown] == ["prompt", "found", "tag"]
    assert all("xxx … xxx" in line and "xxx end" in line for line in shown)
    assert json.loads(cli("show", "a", "--json").stdout)["config"]["prompt"]["value"] == long
    assert json.loads(cli("compare", "a", "b", "--json").stdout)["config"]["prompt"][0] == long


def test_csv_has_a_row_a_step_with_every_bit_of_what_was_logged(cli: Cli, killed_twice: RunDirectory) -> None:
    rows = _read_csv(cli("export", "a").stdout)
    assert list(rows[0]) == ["step", "loss", "val_loss"]
    assert {int(row["step"]): float(row["loss"]) for row in rows} == LOSSES


def test_csv_tells_missing_from_nan_and_infinity(cli: Cli, killed_twice: RunDirectory) -> None:
    rows = _read_csv(cli("export", "a", "--format", "csv").stdout)
    assert [row["val_loss"] for row in rows] == ["", "", "", "", "nan", "", "-inf"]


def test_parquet_reads_back_as_it_was_logged(cli: Cli, killed_twice: RunDirectory, tmp_path: Path) -> None:
    cli("export", "a", "--format", "parquet", "-o", "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("step", "int64"), ("loss", "double"), ("val_loss", "double"),
    ]  # fmt: skip
    assert dict(zip(table["step"].to_pylist(), table["loss"].to_pylist(), strict=True)) == LOSSES
    val_loss = table["val_loss"].to_pylist()
    assert val_loss[:4] == [None] * 4
    assert math.isnan(val_loss[4])
    assert val_loss[5:] == [None, -math.inf]


def test_parquet_goes_to_a_pipe_as_bytes(cli: Cli, killed_twice: RunDirectory) -> None:
    content = cli("export", "a", "--format", "parquet").stdout_bytes
    assert parquet.read_table(io.BytesIO(content)).num_rows == 7


def test_json_is_a_list_of_rows_with_null_for_what_it_cannot_say(
    cli: Cli, killed_twice: RunDirectory
) -> None:
    rows = json.loads(cli("export", "a", "--format", "json").stdout)
    assert {row["step"]: row["loss"] for row in rows} == LOSSES
    assert {row["val_loss"] for row in rows} == {None}


def test_json_answer_carries_the_rows(cli: Cli, killed_twice: RunDirectory) -> None:
    answer = json.loads(cli("export", "a", "--format", "json", "--json").stdout)
    assert answer["run"] == str(killed_twice.path)
    assert [row["step"] for row in answer["rows"]] == list(LOSSES)


def test_json_answer_names_the_file(cli: Cli, killed_twice: RunDirectory, tmp_path: Path) -> None:
    answer = json.loads(cli("export", "a", "-o", "a.csv", "--json").stdout)
    assert answer == {"run": str(killed_twice.path), "format": "csv", "file": "a.csv", "rows": 7}
    assert len(_read_csv((tmp_path / "a.csv").read_text())) == 7


def test_json_answer_of_a_table_needs_a_file(cli: Cli, killed_twice: RunDirectory) -> None:
    with pytest.raises(BadInput, match=r"-o a\.csv"):
        cli("export", "a", "--json")


def test_export_into_a_folder_that_is_not_there_is_refused(cli: Cli, killed_twice: RunDirectory) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        cli("export", "a", "-o", "nowhere/a.csv")


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_run_without_metrics_exports_no_rows(cli: Cli, tmp_path: Path, kind: str) -> None:
    _create(tmp_path, "empty")
    content = cli("export", "empty", "--format", kind).stdout_bytes
    if kind == "parquet":
        assert parquet.read_table(io.BytesIO(content)).num_rows == 0
    else:
        assert content == {"csv": b"step\n", "json": b"[]\n"}[kind]


def test_several_runs_are_exported_as_one_table(cli: Cli, three: list[RunDirectory], tmp_path: Path) -> None:
    rows = _read_csv(cli("export", "c", "a").stdout)
    assert list(rows[0]) == ["run", "step", "loss", "val_loss"]
    assert [(row["run"], row["step"]) for row in rows[28:30]] == [("llm/c", "29"), ("llm/a", "1")]
    assert {row["val_loss"] for row in rows if row["run"] == "llm/c"} == {""}
    assert cli("export", "llm", "c").stdout == cli("export", "a", "b", "c").stdout
    answer = json.loads(cli("export", "llm", "--format", "parquet", "-o", "a.parquet", "--json").stdout)
    assert answer == {
        "runs": [str(run.path) for run in three], "format": "parquet", "file": "a.parquet", "rows": 87,
    }  # fmt: skip
    table = parquet.read_table(tmp_path / "a.parquet")
    assert [str(kind) for kind in table.schema.types] == ["string", "int64", "double", "double"]
    answer = json.loads(cli("export", "a", "c", "--format", "json", "--json").stdout)
    assert answer["rows"][0] == {"run": "llm/a", "step": 1, "loss": 1.0, "val_loss": 0.5}
    with pytest.raises(BadInput, match=r"-o runs\.csv"):
        cli("export", "a", "b", "--json")


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_config_is_exported_as_columns_if_asked_for(cli: Cli, three: list[RunDirectory], kind: str) -> None:
    content = cli("export", "llm", "--config", "--format", kind).stdout_bytes
    if kind == "csv":
        rows: list[dict[str, Any]] = _read_csv(content.decode())
    elif kind == "json":
        rows = json.loads(content)
    else:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    assert list(rows[0]) == ["run", "step", "loss", "val_loss", "config.batch_size", "config.lr"]
    assert [float(row["config.lr"]) for row in rows] == [1e-4] * 29 + [1e-3] * 29 + [1e-2] * 29
    assert {str(row["config.batch_size"]) for row in rows} == {"8"}
    alone = _read_csv(cli("export", "b", "--config").stdout)
    assert list(alone[0]) == ["step", "loss", "val_loss", "config.batch_size", "config.lr"]


def test_what_is_no_run_and_no_experiment_is_not_exported(cli: Cli, three: list[RunDirectory]) -> None:
    with pytest.raises(BadInput, match="no run or experiment 'lln' under runs; did you mean 'llm'"):
        cli("export", "a", "lln")


def test_list_shows_the_newest_last(cli: Cli, killed_twice: RunDirectory, tmp_path: Path) -> None:
    _log(_create(tmp_path, "older", "digits"), _metrics(1, loss=0.25), began=10)
    lines = cli("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "digits/older", "llm/a"]
    assert lines[1].split()[1:4] == ["killed", "1", "0.25"]
    assert lines[2].split()[1:3] == ["finished", "7/7"]


@pytest.mark.parametrize("reference", ["digits", "runs/digits"])
def test_an_experiment_is_listed_by_its_name(
    cli: Cli, three: list[RunDirectory], tmp_path: Path, reference: str
) -> None:
    _log(_create(tmp_path, "d", "digits"), _metrics(1, loss=0.25))
    (tmp_path / "digits").mkdir()  # a folder without runs, such as the script's
    assert _ids(cli("list", reference, "--json").stdout) == ["d"]
    assert _ids(cli("list", "llm", "--sort", "-lr", "--json").stdout) == ["c", "b", "a"]
    with pytest.raises(BadInput, match=r"did you mean 'digits'\?; the experiments in runs are digits, llm$"):
        cli("list", "digit")


def test_what_runs_are_judged_by_has_a_column(cli: Cli, three: list[RunDirectory], tmp_path: Path) -> None:
    assert cli("list").stdout.split()[:7] == ["run", "status", "step", "loss", "val_loss", "started", "time"]
    _log(_create(tmp_path, "d", "digits"), _metrics(1, val_accuracy=0.75), _metrics(2, reward=3.5),
         ("goals", {"goals": {"reward": "max"}}))  # fmt: skip
    head, *lines = (line.split() for line in cli("list").stdout.splitlines())
    assert head[3:7] == ["loss", "val_loss", "val_accuracy", "reward"]
    assert next(line for line in lines if line[0] == "digits/d")[3:5] == ["0.75", "3.5"]


def test_list_as_json_has_the_newest_of_each_metric(cli: Cli, killed_twice: RunDirectory) -> None:
    (run,) = json.loads(cli("list", "--json").stdout)["runs"]
    assert run == {
        "id": "a", "experiment": "llm", "path": str(killed_twice.path), "status": "finished", "step": 7,
        "total_steps": 7, "metrics": {"loss": LOSSES[7], "val_loss": None},
        "started": "1970-01-01T00:16:40.000+00:00", "seconds": 5.0 + 4.0 + 7.0,
    }  # fmt: skip


def test_list_without_runs_says_how_to_start_one(cli: Cli) -> None:
    assert "stoker train" in cli("list").stdout
    assert json.loads(cli("list", "--json").stdout) == {"runs": []}


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 99}'])
def test_a_damaged_run_is_listed_as_damaged_beside_the_others(
    cli: Cli, killed_twice: RunDirectory, tmp_path: Path, damage: str
) -> None:
    _create(tmp_path, "broken").record_file.write_text(damage)
    assert "llm/broken" in cli("list").stdout
    entries = {run["id"]: run for run in json.loads(cli("list", "--json").stdout)["runs"]}
    assert entries["a"]["status"] == "finished"
    assert entries["broken"]["status"] == "damaged"
    assert "run.json" in entries["broken"]["error"]


def test_damage_in_a_journal_is_reported_with_its_place_and_the_rest_is_read(
    cli: Cli, killed_twice: RunDirectory, tmp_path: Path
) -> None:
    odd = _create(tmp_path, "odd")
    _log(odd, ("metrics", {"values": "none"}), _metrics(1, loss=2.0))
    with next(odd.journal.iterdir()).open("ab") as file:
        file.write(b'\x00garbage\n{"type":"metrics","time":1,"step":2,"values":{"loss":1}}\n[1]\n{"torn')
    answer = json.loads(cli("show", "odd", "--json").stdout)
    assert [damage["line"] for damage in answer["damage"]] == [2, 4, 6]
    assert answer["metrics"]["loss"]["points"] == 2
    assert "attempt-0001.rank-0.jsonl, line 4: not JSON" in cli("show", "odd").stdout
    statuses = {run["id"]: run["status"] for run in json.loads(cli("list", "--json").stdout)["runs"]}
    assert statuses == {"a": "finished", "odd": "killed"}


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
def test_a_narrow_terminal_loses_columns_and_never_wraps_an_id(tmp_path: Path, width: int) -> None:
    run_id = "20261123-051200-" + "f" * 30
    directory = _create(tmp_path, run_id)
    _log(directory, ("plan", {"total_steps": 100_000}), _metrics(99_999, loss=1.23456, val_loss=2.34567))
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    terminal.print_list(console, [Listed(directory, view.load(directory))], datetime.now(UTC))
    assert isinstance(console.file, io.StringIO)
    heading, line = console.file.getvalue().splitlines()
    assert line.startswith(f"llm/{run_id}")
    assert len(line.rstrip()) <= max(width, len(f"llm/{run_id}"))
    assert heading.split()[0] == "run"


def test_show_says_what_a_person_wants_to_know(cli: Cli, killed_twice: RunDirectory) -> None:
    out = cli("show", "a").stdout
    for said in (
        "llm/a  finished", "7/7", "stoker train llm lr=0.5", "0123456789ab on main, with uncommitted changes",
        "skipped step-00000004: it has no manifest", "stoker runs export a",
    ):  # fmt: skip
        assert said in out
    assert out.index("lr ") < out.index("batch_size")  # what was set stands before the defaults


def test_show_as_json_has_attempts_config_and_best_metrics(cli: Cli, killed_twice: RunDirectory) -> None:
    answer = json.loads(cli("show", "a", "--json").stdout)
    assert [(a["number"], a["resumed_from"], a["status"]) for a in answer["attempts"]] == [
        (1, None, "killed"), (2, 3, "killed"), (3, 4, "finished"),
    ]  # fmt: skip
    assert answer["config"]["lr"] == {"value": 0.5, "source": "command line"}
    assert answer["metrics"]["loss"]["best_step"] == 7
    assert answer["metrics"]["val_loss"]["non_finite"] == 2
    assert answer["next"][0] == "stoker runs export a"


def test_show_says_on_how_many_machines_an_attempt_was(cli: Cli, tmp_path: Path) -> None:
    directory = _create(tmp_path, "a")
    for more in ({}, {"world": 3, "machines": 3}, {"world": 4, "machines": 2}, {"world": 2}):
        _log(directory, _metrics(1, loss=1.0), **more)
    out = cli("show", "a").stdout
    hosts = [line.partition("here")[2].rpartition("killed")[0].strip() for line in out.splitlines()]
    assert [host for host in hosts if host] == [
        ", 3 ranks on 3 machines",
        ", 4 ranks on 2 machines",
        ", 2 ranks",
    ]
    attempts = json.loads(cli("show", "a", "--json").stdout)["attempts"]
    assert [(a["world"], a["machines"]) for a in attempts] == [(1, 1), (3, 3), (4, 2), (2, 1)]


def test_show_offers_to_go_on_with_a_trial_that_ended_early(cli: Cli, tmp_path: Path) -> None:
    stopped = [
        _create(tmp_path, name, experiment) for name, experiment in (("trial-0001", "search"), ("a", "llm"))
    ]
    for directory in stopped:
        _log(directory, _metrics(1, loss=1.0), _ended("stopped"))
    (stopped[0].path.parent / SWEEP).write_text("{}")
    asked = [json.loads(cli("show", name, "--json").stdout)["next"] for name in ("search/trial-0001", "a")]
    assert asked[0][:2] == ["stoker runs export search/trial-0001", "stoker resume search/trial-0001"]
    assert asked[1] == ["stoker runs export a", "stoker report a", "stoker ui"]


def test_show_tells_a_config_that_changed_on_the_way(cli: Cli, tmp_path: Path) -> None:
    directory = _create(tmp_path, "a")
    _log(directory, _metrics(1, loss=1.0))
    for _ in range(2):
        _, writer = journal.start_attempt(directory.journal)
        writer.append("attempt_started", pid=1, host="here", drift={"lr": [0.5, 0.1]})
        writer.close()
    answer = json.loads(cli("show", "a", "--json").stdout)
    assert answer["config"]["lr"] == {"value": 0.1, "source": "changed at attempt 2"}
    assert cli("show", "a").stdout.count("lr: 0.5 → 0.1") == 1


def test_show_obeys_nothing_that_a_run_says(cli: Cli, tmp_path: Path) -> None:
    directory = _create(tmp_path, "a", note="[bold]\x1b[2Jgone[/nothing]")
    _log(directory, _ended("failed", "ValueError: \x1b]0;title\x07[/oops]"))
    out = cli("show", "a").stdout
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[/oops]" in out
    assert "[bold]" in out


def test_an_unknown_run_is_refused_with_the_nearest(cli: Cli, tmp_path: Path) -> None:
    _create(tmp_path, "baseline")
    with pytest.raises(BadInput, match="did you mean 'baseline'"):
        cli("show", "basline")


@pytest.fixture
def three(tmp_path: Path) -> list[RunDirectory]:
    """Runs a, b and c of growing learning rates; c has no val_loss, and all but it have ended."""
    found = []
    for index, name in enumerate("abc"):
        directory = _create(tmp_path, name, lr=10.0 ** (index - 4))
        values = {} if name == "c" else {"val_loss": [0.5, 0.2][index]}
        events = [_metrics(step, loss=(index + 1) / step, **values) for step in range(1, 30)]
        _log(directory, *events, _ended("finished"), began=1000.0 * index)
        found.append(directory)
    return found


def _ids(out: str) -> list[str]:
    return [run["id"] for run in json.loads(out)["runs"]]


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (("--filter", "val_loss < 0.3 and lr > 1e-4"), ["b"]),
        (("--filter", "lr <= 1e-3"), ["a", "b"]),
        (("--sort", "val_loss"), ["b", "a", "c"]),
        (("--sort", "-val_loss"), ["a", "b", "c"]),
        (("--sort", "-lr", "--filter", "max(loss) >= 2"), ["c", "b"]),
        (("--sort", "best(loss)"), ["a", "b", "c"]),
        (("--filter", "id in ['a', 'c']"), ["a", "c"]),
    ],
)
def test_runs_are_filtered_and_sorted(
    cli: Cli, three: list[RunDirectory], arguments: tuple[str, ...], ids: list[str]
) -> None:
    assert _ids(cli("list", *arguments, "--json").stdout) == ids


def test_what_was_asked_for_has_a_column(cli: Cli, three: list[RunDirectory]) -> None:
    out = cli("list", "--filter", "best(val_loss) < 1", "--sort", "lr").stdout
    assert [line.split()[0] for line in out.splitlines()] == ["run", "llm/a", "llm/b"]
    assert "best(val_loss)" in out
    assert "0.001" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--filter", "val_los < 1"), "did you mean 'val_loss'"),
        (("--filter", "val_loss <"), "cannot be read"),
        (("--sort", "nothing"), "no run has"),
        (("--sort", "a < b"), "give one name"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(
    cli: Cli, three: list[RunDirectory], arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        cli("list", *arguments)


def test_compare_shows_what_differs_first_and_marks_the_best(cli: Cli, three: list[RunDirectory]) -> None:
    answer = json.loads(cli("compare", "a", "b", "c", "--json").stdout)
    assert answer["config"] == {"lr": [1e-4, 1e-3, 1e-2]}
    assert [m and m["best"] for m in answer["metrics"]["val_loss"]] == [0.5, 0.2, None]
    out = cli("compare", "a", "b", "c").stdout
    differing = out.index("config that differs (1 keys are the same)")
    assert differing < out.index("metrics") < out.index("val_loss")
    assert "█" in out
    with pytest.raises(BadInput, match="at least two runs"):
        cli("compare", "a")


def test_an_experiment_is_compared_by_its_name(cli: Cli, three: list[RunDirectory]) -> None:
    assert cli("compare", "llm", "--json").stdout == cli("compare", "a", "b", "c", "--json").stdout


def test_tags_and_notes_are_set_from_outside_of_a_living_run_too(cli: Cli, three: list[RunDirectory]) -> None:
    run = three[0]
    with storage.locked(run.lock_file):
        cli("tag", "a", "team=blue", "why=first=one", "--note", "looks good")
        assert view.load(run).tags == {"team": "blue", "why": "first=one"}
    answer = json.loads(cli("tag", "a", "team=red", "--remove", "why", "--json").stdout)
    assert answer["tags"] == {"team": "red"}
    assert answer["notes"] == ["looks good"]
    assert _ids(cli("list", "--filter", "tags.team == 'red'", "--json").stdout) == ["a"]
    assert view.load(run).step == 29
    for arguments, said in ((("novalue",), "write key=value"), (("--remove", "tea"), "did you mean 'team'")):
        with pytest.raises(BadInput, match=said):
            cli("tag", "a", *arguments)


def test_a_tag_is_set_also_where_the_clock_is_behind_the_run_s(cli: Cli, three: list[RunDirectory]) -> None:
    _log(three[0], ("tags", {"tags": {"team": "green"}}), began=time.time() + 3600)
    cli("tag", "a", "team=red")
    assert view.load(three[0]).tags == {"team": "red"}


def test_rm_asks_and_refuses_a_living_run(cli: Cli, three: list[RunDirectory]) -> None:
    with pytest.raises(BadInput, match="--yes"):
        cli("rm", "a")
    with storage.locked(three[0].lock_file), pytest.raises(BadInput, match="being trained"):
        cli("rm", "b", "a", "--yes")
    assert all(run.exists() for run in three)
    answer = json.loads(cli("rm", "a", "b", "--yes", "--json").stdout)
    assert answer["removed"] == [str(run.path) for run in three[:2]]
    assert _ids(cli("list", "--json").stdout) == ["c"]
    assert not three[0].path.exists()


def test_rm_says_what_becomes_of_a_sweeps_trials(
    cli: Cli, three: list[RunDirectory], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("stoker"), "propagate", True)
    cli("rm", "a", "--yes")
    assert "sweep" not in caplog.text
    (three[1].path.parent / "sweep.json").write_text("{}")
    cli("rm", "b", "c", "--yes")
    assert "2 trials of the sweep llm: its study keeps what they came to" in caplog.text
