from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from stoker.report import html
from stoker.run import journal, media, view
from stoker.run.directory import RunDirectory
from stoker.run.state import RunView

EVIL = """</script></style><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"'&"""


def _run(path: Path, run_id: str = "a", said: str = "fine", **config: Any) -> RunDirectory:
    """A run of two attempts whose every text says something."""
    directory = RunDirectory(path / "runs" / "llm" / run_id)
    directory.create({
        "id": run_id, "experiment": "llm", "command": ["stoker", "train", said], "cwd": said,
        "recipe": {"name": said}, "config": {"text": said, **config}, "sources": {"text": said}, "seed": 0,
        "code": {"commit": said, "branch": said, "dirty": True},
    })  # fmt: skip
    (directory.provenance / "diff.patch").write_text(said)
    (directory.provenance / "requirements.txt").write_text(said)
    (directory.provenance / "environment.json").write_text(json.dumps({said: said, "gpus": [said]}))
    for number in (1, 2):
        _, writer = journal.start_attempt(directory.journal)
        time = 1000.0 * number
        writer.append("attempt_started", time=time, pid=1, host=said, drift={"text": [said, said + "!"]})
        if number == 2:
            writer.append("resumed", time=time, step=2, passed_over=[said])
        for step in range(2 * number - 1, 2 * number + 2):
            writer.append("metrics", time=time + step, step=step, values={"loss": 1 / step, said: 1.0 * step})
            table = media.table([[said, said], [None, "0.5"]], [said, "b"])
            file = media.write(directory, "table", "t", step, table)
            about = {"kind": "table", "name": said, "step": step, "file": file, "about": table.about}
            writer.append("media", time=time + step, **about)
        files = [{"path": f"artifacts/{said}", "size": 1, "sha256": said}]
        writer.append("artifact", time=time + 50, name=said, kind=said, path=f"artifacts/{said}", files=files)
        writer.append("tags", time=time + 50, tags={said: said})
        writer.append("attempt_ended", time=time + 60, status="failed", error=said)
        writer.close()
    return directory


def _view(path: Path, run_id: str = "a", said: str = "fine", **config: Any) -> RunView:
    return view.load(_run(path, run_id, said, **config))


class _Page(HTMLParser):
    """The elements of a page with their attributes, the text outside of scripts, and the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._in = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_text_of_a_run_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    page = _Page(html.render([_view(tmp_path, "a", EVIL), _view(tmp_path, "b", EVIL)]))
    harmless = _Page(html.render([_view(tmp_path, "c"), _view(tmp_path, "d")]))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    assert page.scripts[1:] == harmless.scripts[1:]
    assert page.text.count(EVIL) > 20
    assert [figure["title"] for figure in json.loads(page.scripts[0])["curves"]] == ["loss", EVIL]


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    page = _Page(html.render([_view(tmp_path, "a", EVIL)]))
    assert not [(tag, a) for tag, a in page.elements if {"src", "href", "srcset", "data", "action"} & set(a)]
    styles = re.findall(r"<style>(.*?)</style>", html.render([_view(tmp_path, "b")]), re.DOTALL)
    assert not re.search(r"url\(|@import|http", "".join(styles))


def test_the_page_allows_its_own_scripts_alone(tmp_path: Path) -> None:
    page = _Page(html.render([_view(tmp_path)]))
    policy = next(a["content"] for a in page.attributes("meta") if "http-equiv" in a) or ""
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[1:]]
    assert len(digests) == 2
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"default-src 'none'; script-src {allowed};" in policy


def test_plotly_stands_in_the_page_once(tmp_path: Path) -> None:
    page = html.render([_view(tmp_path, "a"), _view(tmp_path, "b")])
    assert page.count("plotly.js v") == 1


def test_the_same_run_gives_the_same_bytes_even_once_its_report_is_recorded(tmp_path: Path) -> None:
    directory = _run(tmp_path)
    output = directory.artifacts / "report.html"
    first = html.write([view.load(directory)], output).read_bytes()
    name = sorted(directory.journal.iterdir())[-1]
    recorded = {
        "type": "artifact", "time": 9999.0, "name": "report.html", "kind": "report",
        "path": "artifacts/report.html", "files": [],
    }  # fmt: skip
    with name.open("a") as file:
        file.write(json.dumps(recorded) + "\n")
    assert html.write([view.load(directory)], output).read_bytes() == first


def test_no_half_report_is_left_beside_it(tmp_path: Path) -> None:
    output = html.write([_view(tmp_path)], tmp_path / "out" / "report.html")
    assert [file.name for file in output.parent.iterdir()] == ["report.html"]


def test_configs_stand_side_by_side_with_what_differs_first(tmp_path: Path) -> None:
    page = html.render(
        [_view(tmp_path, "a", lr=0.5, same=1), _view(tmp_path, "b", lr=0.25, same=1, more="x")]
    )
    config = page[page.index("<h2>Config</h2>") : page.index("<h2>Attempts</h2>")]
    rows = re.findall(r'<tr class="(\w*)"><td class="name">(\w+)</td>', config)
    assert rows == [("marked", "lr"), ("marked", "more"), ("", "text"), ("", "same")]
    assert "missing" in config


def test_earlier_tables_are_folded_away(tmp_path: Path) -> None:
    page = html.render([_view(tmp_path, said="generations")])
    assert "generations at step 5" in page
    assert "<summary>4 earlier</summary>" in page


@pytest.mark.parametrize(
    ("ids", "names"), [(("a", "b"), ["a", "b"]), (("a",), ["llm/a"])], ids=["several", "one"]
)
def test_runs_are_called_by_what_tells_them_apart(
    tmp_path: Path, ids: tuple[str, ...], names: list[str]
) -> None:
    assert html.run_names([_view(tmp_path, run_id) for run_id in ids]) == names


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path: Path) -> None:
    views = [_view(tmp_path / folder) for folder in ("x", "y")]
    assert html.run_names(views) == [str(tmp_path / folder / "runs" / "llm" / "a") for folder in ("x", "y")]


def test_a_run_that_logged_nothing_has_a_report(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "runs" / "llm" / "a")
    directory.create({"id": "a", "experiment": "llm", "config": {}, "sources": {}})
    page = _Page(html.render([view.load(directory)]))
    assert "killed" in page.text
    assert len(page.scripts) == 1
