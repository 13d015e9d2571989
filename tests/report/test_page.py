"""The page of a report as a browser shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stoker import storage
from stoker.report import html
from stoker.run import journal, media, view
from stoker.run.directory import RunDirectory

from browser import Browser, needs_chromium
from support import SOAK, until

pytestmark = needs_chromium

EVIL = """</script><img src=x onerror="document.title='hacked'">"""
PLOTLY = b'{"data": [{"type": "scattergl", "x": [1, 2], "y": [3, 4], "name": "<a href=\\"x\\">n</a>"}]}'
DRAW_ALL = "dispatchEvent(new Event('beforeprint')) && [...document.querySelectorAll('details')].map(d => d.open = true)"  # noqa: E501
ALL_DRAWN = "[...document.querySelectorAll('.plot')].every(p => !p.offsetParent || p.dataset.drawn === 'yes')"


def _run(path: Path, run_id: str) -> RunDirectory:
    """A run of two attempts an hour apart with everything that a page can show."""
    directory = RunDirectory(path / "runs" / "demo" / run_id)
    directory.create({"id": run_id, "experiment": "demo", "config": {"lr": 0.1}, "sources": {}})
    for number in (1, 2):
        _, writer = journal.start_attempt(directory.journal)
        begin = 3600.0 * number
        writer.append("attempt_started", time=begin, pid=1, host="here")
        writer.append("plan", time=begin + 5, total_steps=200, samples_per_step=4, tokens_per_step=40)
        if number == 2:
            writer.append("resumed", time=begin, step=90, passed_over=[])
        for step in range(90 * number - 89, 100 * number + 1):
            values = {"loss": 1 / step, "val_loss": 2 / step, EVIL: 1.0 * step}
            values |= {"tokens_per_second": 40.0 + step, "seconds_evaluating": 1.0} if step % 10 == 0 else {}
            values |= {"loss": float("nan")} if step == 30 else {"loss": float("inf")} if step == 40 else {}
            encoded = journal.encode_values(values)
            writer.append("metrics", time=begin + step, step=step, values=encoded)
            if step == 90:
                seconds = {"waiting": 1.0, "evaluating": 2.0, "checkpointing": 3.0}
                writer.append("spent", time=begin + step, step=step, over=False, seconds=seconds)
        writer.append("system", time=begin + 50, step=0, values={"gpu_0_power_watts": 1.0})
        step = 80 * number  # the first is before the resume, which voids what came after
        for kind, encoded in (
            ("image", media.image(np.zeros((2, 2)), EVIL)),
            ("figure", media.Encoded(PLOTLY, ".plotly.json", {})),
            ("text", media.text(EVIL)),
        ):
            file = media.write(directory, kind, "x", step, encoded)
            about = {"kind": kind, "name": kind + EVIL, "step": step, "file": file, "about": encoded.about}
            writer.append("media", time=begin + 100, **about)
        about = media.histogram(np.arange(50.0) * number, 8)
        writer.append("media", time=begin + 100, kind="histogram", name="h", step=step, about=about)
        writer.append("attempt_ended", time=begin + 300, status="finished", error=None)
        writer.close()
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    return html.write([view.load(_run(path, run)) for run in "ab"], path / "report.html")


@pytest.fixture(scope="module")
def chromium(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(page, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Browser:
    """With the page as it is when it is opened."""
    chromium.show(page)
    chromium.until(f"{DRAW_ALL}, {ALL_DRAWN}")
    return chromium


def _set(selector: str, value: str, event: str = "input") -> str:
    return f"""(() => {{ const input = document.querySelector({selector!r});
        input.value = {value!r}; input.dispatchEvent(new Event({event!r})); }})()"""


def _curve(field: str) -> str:
    return f"document.querySelector('.plot').data.map(t => t.{field})"


def test_everything_is_drawn_and_the_console_is_silent(browser: Browser) -> None:
    shown = "[...document.querySelectorAll('.plot')].filter(plot => plot.offsetParent)"
    drawn = f"{shown}.map(plot => plot.dataset.of + !!plot.querySelector('.main-svg'))"
    assert set(browser.run(drawn)) == {
        "curvestrue", "performancetrue", "machinetrue", "histogramstrue", "drawingstrue",
    }  # fmt: skip
    assert browser.run("document.querySelectorAll('.plot .scatterlayer path.js-line').length") >= 4
    assert browser.run("document.title") == "a, b · stoker"
    assert browser.errors == []


def test_every_control_can_be_used_and_the_console_stays_silent(browser: Browser) -> None:
    before = len(browser.run(_curve("type")))
    for script in (
        _set("#smoothing", "0.8"), _set("#axis", "samples", "change"), _set("#axis", "time", "change"),
        "document.querySelectorAll('.log').forEach(input => input.click())",
        "document.querySelectorAll('.steps input').forEach(input => { input.value = '0';"
        "input.dispatchEvent(new Event('input')); })",
    ):  # fmt: skip
        browser.run(script)
        browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        browser.until(f"{DRAW_ALL}, {ALL_DRAWN}")
    assert len(browser.run(_curve("type"))) == before + 4, "a smooth curve for each of two metrics and runs"
    assert browser.run("document.querySelector('.plot').layout.yaxis.type") == "log"
    for dark in (True, False):
        browser.dark(dark=dark)
        browser.until(f"{DRAW_ALL}, {ALL_DRAWN}")
    shown = "[...document.querySelectorAll('.frames figure:not([hidden])')].map(f => f.dataset.step)"
    assert set(browser.run(shown)) == {"80"}
    assert browser.errors == []


def test_time_does_not_count_what_lies_between_attempts(browser: Browser) -> None:
    browser.run(_set("#axis", "time", "change"))
    browser.until("document.querySelector('.plot').layout.xaxis.title.text.startsWith('time')")
    last = browser.run("document.querySelector('.plot').data[0].x.at(-1)")
    assert last == pytest.approx((300 + 200) / 60)


def test_what_is_not_finite_is_a_gap_and_is_marked(browser: Browser) -> None:
    assert browser.run("document.querySelector('.plot').data[0].y.slice(29, 31)") == [
        None,
        pytest.approx(1 / 31),
    ]
    texts = browser.run("document.querySelector('.plot').data.find(t => t.yaxis === 'y2').text")
    assert texts == ["NaN at step 30", "inf at step 40"]


def test_a_smooth_curve_is_a_debiased_mean_of_what_came_before(browser: Browser) -> None:
    browser.run(_set("#smoothing", "0.81"))
    browser.until(f"{_curve('type')}.length > 6")
    raw, smooth = browser.run("document.querySelector('.plot').data.slice(0, 2).map(t => t.y.slice(0, 3))")
    kept = 0.9 ** (1000 / 199)
    assert smooth[0] == raw[0]
    assert smooth[1] == pytest.approx((raw[0] * kept + raw[1]) / (kept + 1))


def test_a_loss_that_is_typed_is_answered_for_each_run(browser: Browser) -> None:
    answers = "[...document.querySelectorAll('.answer')].map(cell => cell.textContent)"
    assert browser.run(answers) == ["", ""]
    browser.run(_set("#wanted", "0.025"))  # the val_loss of step n is 2 / n
    assert browser.run(answers) == ["1:20step 80, 3.2k tokens"] * 2
    browser.run(_set("#wanted", "0.001"))
    assert browser.run(answers) == ["not reached"] * 2
    browser.run(_set("#wanted-of", "loss", "change") + "; " + _set("#wanted", "2"))
    assert browser.run(answers) == ["1.0 sstep 1, 40 tokens"] * 2
    assert browser.errors == []


def test_a_step_of_images_is_shown_by_the_slider(browser: Browser) -> None:
    shown = "document.querySelector('.images figure:not([hidden])').dataset.step"
    assert browser.run(shown) == "160"
    browser.run(_set(".images input", "0"))
    assert browser.run(shown) == "80"
    assert browser.run("document.querySelector('.images img').naturalWidth") == 2


ERRORS = ["console.error('x')", "throw new Error('x')", "Plotly.missing()"]


@pytest.mark.soak
@pytest.mark.parametrize("script", ERRORS if SOAK else ERRORS[:1])
def test_an_error_in_the_console_is_noticed(
    chromium: Browser, page: Path, tmp_path: Path, script: str
) -> None:
    broken = tmp_path / "broken.html"
    text = page.read_text().replace("script-src ", "script-src 'unsafe-inline' ", 1)
    storage.write_atomically(broken, text.replace("</body>", f"<script>{script}</script></body>").encode())
    chromium.show(broken)
    until(lambda: chromium.run("0") == 0 and chromium.errors)
    refused = [error for error in chromium.errors if "Content Security Policy" in error]
    assert refused, "unsafe-inline counts for nothing beside a hash"


def test_a_constant_accuracy_and_a_narrow_page_can_be_read(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "runs" / "demo" / "narrow")
    keys = {"deepspeed.offload_parameters": False, "precision": "fp32"}
    directory.create(
        {"id": "a", "experiment": "demo", "config": keys, "sources": dict.fromkeys(keys, "command line")}
    )
    _, writer = journal.start_attempt(directory.journal)
    writer.append("attempt_started", pid=1, host="here")
    for step in (1, 2):
        writer.append("metrics", step=step, values={"val_accuracy": 0.6})
    writer.close()
    page = html.write([view.load(directory)], tmp_path / "report.html")
    with Browser(page, tmp_path / "profile", width=500) as opened:
        opened.until(f"{DRAW_ALL}, {ALL_DRAWN}")
        low, high = opened.run("document.querySelector('.plot').layout.yaxis.range")
        assert 0.5 < low < 0.6 < high < 0.7
        opened.run("document.body.style.width = '375px'")
        heights = opened.run("[...document.querySelectorAll('td .source')].map(said => said.offsetHeight)")
        assert len(heights) == 2
        assert max(heights) < 30, "no word of it is broken"
