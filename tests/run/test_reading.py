from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import stoker
from stoker import BadInput, Run
from stoker.run import reading
from stoker.run.state import RunView

Trained = Callable[..., Run]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Make a run `experiment/id` with two steps of a loss, under `runs/` of the working directory."""
    monkeypatch.chdir(tmp_path)

    def train(name: str, loss: float = 1.0, more: dict[str, float] | None = None, **config: Any) -> Run:
        with Run(*name.split("/"), config=config) as run:
            run.log(loss=loss)
            run.log({"loss": loss / 2, **(more or {})})
        return run

    return train


def _names(views: list[RunView]) -> list[str]:
    return [f"{run.directory.experiment}/{run.directory.id}" for run in views]


def test_all_runs_are_read_oldest_first_where_none_is_named(trained: Trained) -> None:
    for name in ("digits/b", "digits/a", "llm/c"):
        trained(name)
    assert _names(stoker.runs()) == ["digits/b", "digits/a", "llm/c"]


@pytest.mark.parametrize(
    ("references", "names"),
    [
        (("a",), ["digits/a"]),
        (("fir",), ["llm/first"]),
        (("llm/first",), ["llm/first"]),
        (("runs/digits/a",), ["digits/a"]),
        (("digits",), ["digits/a", "digits/b"]),
        (("digits/",), ["digits/a", "digits/b"]),
        ((Path("runs/digits"),), ["digits/a", "digits/b"]),
        (("b", "digits", "llm"), ["digits/b", "digits/a", "llm/first"]),
    ],
)
def test_a_reference_is_a_run_or_an_experiment_and_each_run_comes_once(
    trained: Trained, references: tuple[str, ...], names: list[str]
) -> None:
    for name in ("digits/a", "digits/b", "llm/first"):
        trained(name)
    assert _names(stoker.runs(*references)) == names


def test_the_folder_is_the_one_given_else_that_of_the_environment(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("digits/a")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert _names(stoker.runs("a", runs="elsewhere")) == ["digits/a"]
    monkeypatch.setenv("STOKER_RUNS", str(tmp_path / "elsewhere"))
    (run,) = stoker.runs()
    monkeypatch.chdir("/")
    assert (run.directory.path / "run.json").is_file()


@pytest.mark.parametrize(
    ("references", "said"),
    [
        (("digit",), "no run or experiment 'digit' under .*; did you mean 'digits'"),
        (("",), "give a run"),
        (("a",), "several runs: digits/ab, digits/ac"),
        (("llm",), "'llm' is an experiment and a run: write 'llm/' or 'digits/llm'"),
    ],
)
def test_what_means_nothing_or_too_much_is_refused(
    trained: Trained, references: tuple[str, ...], said: str
) -> None:
    for name in ("digits/ab", "digits/ac", "digits/llm", "llm/x"):
        trained(name)
    with pytest.raises(BadInput, match=said):
        stoker.runs(*references)
    assert _names(stoker.runs("llm/")) == ["llm/x"]


def test_an_experiment_of_one_run_of_the_same_name_is_that_run(trained: Trained) -> None:
    trained("digits/digits")
    assert _names(stoker.runs("digits")) == ["digits/digits"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"no readable run under {tmp_path}"):
        stoker.runs(runs=tmp_path)


def test_a_damaged_run_is_left_out_of_many_with_a_warning_and_refused_where_it_is_named(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    trained("digits/a")
    trained("digits/b").directory.record_file.write_text("{")
    assert _names(stoker.runs("digits")) == _names(stoker.runs()) == ["digits/a"]
    assert len([record for record in caplog.records if "left out" in record.message]) == 2
    with pytest.raises(BadInput, match="cannot be read"):
        stoker.runs("a", "b")


def test_a_view_says_what_users_need_of_a_run(trained: Trained) -> None:
    run = trained("digits/a", loss=0.5, lr=0.1)
    (seen,) = stoker.runs("a")
    assert (seen.directory.id, seen.directory.experiment) == ("a", "digits")
    assert seen.directory.path == run.directory.path
    assert (seen.config, seen.status, seen.step, seen.newest()) == (
        {"lr": 0.1},
        "finished",
        2,
        {"loss": 0.25},
    )
    assert (seen.summary()["loss"].best, seen.summary()["loss"].best_step) == (0.25, 2)
    assert seen.points["loss"] == {1: 0.5, 2: 0.25}


def test_a_living_run_is_read_as_it_is_now(tmp_path: Path) -> None:
    with Run("digits", "a", runs=tmp_path) as run:
        for steps in (1, 2):
            run.log(loss=1.0)
            (seen,) = stoker.runs("digits", runs=tmp_path)
            assert (seen.status, seen.metrics().num_rows) == ("running", steps)
    assert stoker.runs("a", runs=tmp_path)[0].status == "finished"


def test_metrics_are_a_table_by_step_in_which_nan_is_not_missing(tmp_path: Path) -> None:
    with Run("digits", "a", runs=tmp_path) as run:
        run.log(loss=math.nan, accuracy=0.5, step=1)
        run.log(val_loss=math.inf, step=2**40)
    (seen,) = stoker.runs("a", runs=tmp_path)
    table = seen.metrics()
    assert table.schema == pa.schema(
        {"step": pa.int64(), "accuracy": pa.float64(), "loss": pa.float64(), "val_loss": pa.float64()}
    )
    first, second = table.to_pylist()
    assert math.isnan(first.pop("loss"))
    assert first == {"step": 1, "accuracy": 0.5, "val_loss": None}
    assert second == {"step": 2**40, "accuracy": None, "loss": None, "val_loss": math.inf}
    frame = table.to_pandas()
    assert list(frame["step"]) == [1, 2**40]


def test_of_several_runs_the_columns_are_those_of_all(trained: Trained) -> None:
    trained("digits/a", loss=1.0, more={"run": 5.0})
    trained("llm/b", loss=4.0, more={"accuracy": 0.5})
    with Run("llm", "empty"):
        pass
    table = reading.table(stoker.runs())
    assert table.column_names == ["run", "step", "accuracy", "loss", "metrics.run"]
    assert [list(row.values()) for row in table.to_pylist()] == [
        ["digits/a", 1, None, 1.0, None],
        ["digits/a", 2, None, 0.5, 5.0],
        ["llm/b", 1, None, 4.0, None],
        ["llm/b", 2, 0.5, 2.0, None],
    ]


def test_config_columns_keep_numbers_and_fall_back_to_texts(trained: Trained) -> None:
    trained("digits/a", lr=1, batch="auto", layers=[1, 2], deep=True, seed=2**64 - 1)
    trained("digits/b", lr=0.5, batch=8, layers=[3], extra="x")
    table = reading.table(stoker.runs(), config=True)
    assert table.column_names == [
        "run", "step", "loss", "config.batch", "config.deep", "config.extra", "config.layers", "config.lr",
        "config.seed",
    ]  # fmt: skip
    assert table["config.lr"].to_pylist() == [1.0, 1.0, 0.5, 0.5]
    assert table["config.deep"].to_pylist() == [True, True, None, None]
    assert table["config.batch"].to_pylist() == ["auto", "auto", "8", "8"]
    assert table["config.layers"].to_pylist() == ["[1, 2]", "[1, 2]", "[3]", "[3]"]
    assert table["config.extra"].to_pylist() == [None, None, "x", "x"]
    assert [int(value) for value in table["config.seed"].to_pylist()[:2]] == [2**64 - 1] * 2


def test_runs_of_one_name_in_two_folders_are_told_apart_by_their_paths(
    trained: Trained, tmp_path: Path
) -> None:
    first = trained("digits/a")
    (tmp_path / "runs").rename(tmp_path / "before")
    second = trained("digits/a")
    paths = [str(tmp_path / "before" / "digits" / "a"), str(second.directory.path)]
    assert first.directory.path == second.directory.path
    assert reading.table(stoker.runs(*paths))["run"].to_pylist() == [paths[0]] * 2 + [paths[1]] * 2


def test_the_lines_of_the_docs_run_as_they_stand(trained: Trained) -> None:
    trained("image/a", loss=4.0, more={"val_loss": 0.5, "lr": 0.0}, lr=0.2)
    trained("image/b", loss=1.0, more={"val_loss": 0.1}, lr=0.1)
    page = Path(__file__).parents[2] / "docs" / "tracking.md"
    section = page.read_text().partition("## Read runs from Python")[2]
    code = section.partition("```python\n")[2].partition("```")[0].replace(".plot()", "")
    said: dict[str, Any] = {}
    exec(code.replace("curves.pivot_table", "table = curves.pivot_table"), said)
    assert list(said["overview"].index) == ["b", "a"]
    assert said["overview"].loc["a", ("config", "lr")] == 0.2
    assert said["overview"].loc["a", ("last", "lr")] == 0.0
    assert said["table"].to_dict("list") == {"a": [4.0, 2.0], "b": [1.0, 0.5]}


def test_reading_runs_loads_nothing_heavy(trained: Trained) -> None:
    trained("digits/a")
    code = (
        "import sys, stoker; (run,) = stoker.runs(); run.config, run.summary();"
        "print({'torch', 'pyarrow', 'pandas', 'mlflow'} & set(sys.modules)); run.metrics();"
        "print({'torch', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["set()", "set()"]
