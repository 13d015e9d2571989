from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from stoker.cli.verbs.report import report
from stoker.errors import BadInput
from stoker.run import journal
from stoker.run.directory import RunDirectory
from typer.testing import CliRunner, Result


def _run(path: Path, run_id: str, **config: Any) -> RunDirectory:
    directory = RunDirectory(path / "runs" / "llm" / run_id)
    directory.create({"id": run_id, "experiment": "llm", "config": config, "sources": {}})
    _, writer = journal.start_attempt(directory.journal)
    writer.append("attempt_started", pid=1, host="here")
    for step in (1, 2, 3):
        writer.append("metrics", step=step, values={"loss": 1 / step})
    writer.append("attempt_ended", status="finished", error=None)
    writer.close()
    return directory


def _report(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(report)
    result = CliRunner().invoke(app, list(arguments), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_report_of_one_run_stands_among_its_artifacts(tmp_path: Path) -> None:
    directory = _run(tmp_path, "a", lr=0.1)
    out = _report("a").stdout
    assert out.strip() == str(directory.artifacts / "report.html")
    assert "llm/a" in (directory.artifacts / "report.html").read_text()


def test_the_report_of_several_runs_stands_here(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _run(tmp_path, name, lr=0.1)
    answer = json.loads(_report("a", "b", "--json").stdout)
    file = tmp_path / "report.html"
    assert answer == {
        "report": str(file),
        "runs": [str(tmp_path / "runs" / "llm" / name) for name in ("a", "b")],
        "bytes": file.stat().st_size,
    }


def test_a_run_named_twice_is_reported_once(tmp_path: Path) -> None:
    _run(tmp_path, "a")
    assert len(json.loads(_report("a", "llm/a", "--json").stdout)["runs"]) == 1


def test_the_report_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    _run(tmp_path, "a")
    _report("a", "-o", "new/folder/page.html")
    assert (tmp_path / "new" / "folder" / "page.html").is_file()


def test_a_report_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    _run(tmp_path, "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="choose another file with -o"):
        _report("a", "-o", "file/page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "runs"]
