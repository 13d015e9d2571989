"""What a run can hold besides metrics: media, artifacts with lineage, params, goals, what a watch sees."""

from __future__ import annotations

import enum
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stoker import BadInput, Run, storage
from stoker.run import artifacts, compact, journal, media, view
from stoker.run.directory import RunDirectory
from stoker.run.recorder import Recorder
from stoker.run.state import RunView
from stoker.tracking import background
from stoker.tracking.system import SystemSampler
from stoker.world import World

from support import LONG, until

Open = Callable[..., Run]


@pytest.fixture
def open_run(tmp_path: Path) -> Open:
    return lambda name="a", **options: Run("test", name, runs=tmp_path / "runs", **options)


def _seen(run: Run) -> RunView:
    return view.load(run.directory)


# -- metrics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a\nb", "tab\t", "x" * 251, "ä" * 126, "\x00"])
def test_a_name_with_control_characters_or_too_long_is_refused(open_run: Open, name: str) -> None:
    with open_run() as run, pytest.raises(ValueError, match="metric"):
        run.log({name: 1.0})


def test_the_longest_name_is_taken(open_run: Open) -> None:
    with open_run() as run:
        run.log({"ä" * 125: 1.0})
    assert list(_seen(run).points) == ["ä" * 125]


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        ("3", TypeError, "loss='3': a metric must be"),
        (None, TypeError, "loss is of type NoneType"),
        ([1.0], TypeError, "list"),
        (1j, TypeError, "loss is complex"),
        (np.complex64(1 + 1j), TypeError, "loss is complex"),
        (torch.tensor(1 + 1j), TypeError, "loss is complex"),
        (10**400, TypeError, "loss is of type int"),
        (torch.ones(3), ValueError, r"loss has the shape \(3,\)"),
        (np.ones((2, 2)), ValueError, r"loss has the shape \(2, 2\)"),
    ],
)
def test_a_value_that_is_no_number_is_named(
    open_run: Open, value: Any, error: type[Exception], said: str
) -> None:
    with open_run() as run, pytest.raises(error, match=said):
        run.log(loss=value)


@pytest.mark.parametrize("value", [np.array([1.5]), np.array([[1.5]]), torch.tensor([1.5])])
def test_an_array_or_a_tensor_of_one_element_is_a_number(open_run: Open, value: Any) -> None:
    with open_run() as run:
        run.log(loss=value)
    assert list(_seen(run).points["loss"].values()) == [1.5]


def test_every_way_of_logging_writes_the_same(open_run: Open) -> None:
    """The short way that plain floats take, and the long one of everything else."""
    values = [0.1 + 0.2, 1e-320, 1.7e308, -0.0, 3.0]
    with open_run() as run:
        for step, value in enumerate(values, 1):
            run.log(plain=value)
            run.log(tensor=torch.tensor(value, dtype=torch.float64), number=np.float64(value), step=step)
        run.log(plain=math.nan, number=True)
        run.log(plain=-math.inf, number=7)
    points = _seen(run).points
    assert list(points["plain"].values())[:5] == values
    assert list(points["tensor"].values()) == values
    assert list(points["number"].values()) == [*values, 1.0, 7.0]
    assert math.isnan(points["plain"][6])
    assert points["plain"][7] == -math.inf


def test_a_step_that_goes_back_is_kept_at_its_place_and_warned_of_once(
    open_run: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_run() as run:
        run.log(a=10.0, step=10)
        run.log(a=3.0, step=3)
        run.log(a=99.0, step=10)
        run.log(a=4.0, step=4)
    assert _seen(run).points["a"] == {3: 3.0, 4: 4.0, 10: 10.0}
    warned = (run.directory.logs / "rank-0.log").read_text().count("after step 10")
    assert warned == 1


def test_the_latest_value_is_the_first_of_the_newest_step_as_in_the_journal(open_run: Open) -> None:
    with open_run() as run:
        for value in (3.0, 9.0):
            run.log(a=value, step=3)
            run.log(b=torch.tensor(value), c=1.0, step=3)
        run.log(a=1.0, late=1.0, step=1)
        run.log(late=0.0, step=0)
        assert run.latest == {"a": 3.0, "b": 3.0, "c": 1.0, "late": 1.0}
        assert run.latest == {metric: summary.last for metric, summary in run.summary.items()}
    with open_run() as run:
        run.attempt.resumed(2)
        run.log(a=2.0, step=2)
        run.log(a=7.0, step=3)
        run.log(a=8.0, late=5.0, step=3)
        assert run.latest == {"a": 7.0, "late": 5.0}
        assert run.latest == {metric: summary.last for metric, summary in run.summary.items()}


def test_ranks_agree_on_the_first_value_of_the_newest_step(tmp_path: Path) -> None:
    recorder = Recorder(journal.JournalWriter(tmp_path / "a.jsonl"), World(size=2), lambda: None)
    for step, value in ((2, 1.0), (2, 7.0), (1, 5.0)):
        recorder.log({"loss": value}, step, reduce="sum")
    assert recorder.unreduced == {"loss": (2, 1.0, "sum")}
    recorder.agree([dict(recorder.unreduced), {"loss": (2, 3.0, "sum")}])
    recorder.log({"loss": 9.0}, 2, reduce="sum")
    recorder.agree([dict(recorder.unreduced), {"loss": (2, 9.0, "sum")}])
    assert recorder.latest == {"loss": 4.0}


def test_media_land_at_the_step_that_was_last_logged_and_counting_goes_on_from_it(open_run: Open) -> None:
    with open_run() as run:
        for step in (10, np.int64(20), 30, 25, -1):
            run.log(a=1.0, step=step)
            run.text("said", str(step))
        for refused in ("31", True):
            with pytest.raises(TypeError):
                run.log(a=1.0, step=refused)
        assert run.step == 30
        run.log(b=1.0)
    seen = _seen(run)
    assert [m.step for m in seen.media] == [10, 20, 30]
    assert list(seen.points["a"]) == [-1, 10, 20, 25, 30]
    assert list(seen.points["b"]) == [31]


@pytest.mark.parametrize("step", [1.5, "3", True])
def test_a_step_that_is_no_whole_number_is_refused(open_run: Open, step: Any) -> None:
    with open_run() as run, pytest.raises(TypeError, match="whole number"):
        run.log(a=1.0, step=step)


@pytest.mark.parametrize("step", [2**63, -(2**63) - 1])
@pytest.mark.parametrize("value", [1.0, torch.tensor(1.0)])
def test_a_step_beyond_64_bits_is_refused(open_run: Open, value: Any, step: int) -> None:
    with open_run() as run:
        run.log(a=1.0, step=1)
        with pytest.raises(ValueError, match="64 bits"):
            run.log(a=value, step=step)
        run.log(a=1.0, step=2**63 - 1)
    assert list(_seen(run).points["a"]) == [1, 2**63 - 1]
    assert _seen(run).damage == []


def test_summary_and_goals(open_run: Open) -> None:
    with open_run() as run:
        run.goal(score="max")
        for value in (2.0, 5.0, math.nan, 3.0):
            run.log(score=value, loss=value, other=value)
        now = run.summary
        with pytest.raises(ValueError, match="'min' or 'max'"):
            run.goal(score="up")  # type: ignore[arg-type]
    assert now == _seen(run).summary()
    score, loss, other = now["score"], now["loss"], now["other"]
    assert (score.last, score.min, score.max, score.best, score.best_step) == (3.0, 2.0, 5.0, 5.0, 2)
    assert (loss.best, loss.best_step, loss.non_finite, loss.points) == (2.0, 1, 1, 4)
    assert other.best is None


# -- media -------------------------------------------------------------------------------------


def test_tables_come_from_rows_columns_and_frames(open_run: Open) -> None:
    import pandas as pd
    import pyarrow as pa

    wanted = (["a", "b"], [[1, "x"], [2, None]])
    given: list[tuple[Any, Any]] = [
        ([{"a": 1, "b": "x"}, {"a": 2}], None),
        ([(1, "x"), (np.int64(2), None)], ["a", "b"]),
        ({"a": torch.tensor([1, 2]), "b": ["x", None]}, None),
        (pd.DataFrame({"a": [1, 2], "b": ["x", None]}), None),
        (pa.table({"b": ["x", None], "a": [1, 2]}), ["a", "b"]),
    ]
    with open_run() as run:
        for index, (rows, columns) in enumerate(given):
            run.table(f"t{index}", rows, columns)
        run.table("empty", [], ["a"])
        for rows, columns in (([(1, 2)], ["a"]), ([(1, 2)], None), ([{"a": 1}, {"a": "x"}], None)):
            with pytest.raises((ValueError, TypeError)):
                run.table("bad", rows, columns)
    *tables, empty = _seen(run).media
    for table in tables:
        assert table.file is not None
        assert media.read_table((run.directory.path / table.file["path"]).read_bytes()) == wanted
    assert empty.about == {"columns": ["a"], "rows": 0}


def test_images_come_from_arrays_tensors_and_pillow(open_run: Open) -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    given = {
        "bytes": grey, "floats": grey / 255, "tensor": torch.tensor(grey / 255),
        "pillow": Image.fromarray(grey), "last": grey[..., None], "first": grey[None], "bool": grey > 100,
    }  # fmt: skip
    with open_run() as run:
        for name, picture in given.items():
            run.image(name, picture, caption="a caption")
        run.image("colour", np.zeros((3, 8, 8)))
        for bad in (np.zeros((2, 8, 8)), np.zeros(5), np.zeros((4, 4), dtype=np.int64), np.zeros((0, 4))):
            with pytest.raises(ValueError, match="image"):
                run.image("bad", bad)
    seen = {m.name: m for m in _seen(run).media}
    for name in given.keys() - {"bool"}:
        file = seen[name].file
        assert file is not None
        assert (np.asarray(Image.open(run.directory.path / file["path"])) == grey).all(), name
    assert seen["bytes"].about == {"width": 4, "height": 3, "caption": "a caption"}
    assert (seen["colour"].about["width"], seen["colour"].about["height"]) == (8, 8)


def test_an_image_whose_floats_are_clipped_is_warned_of_once_for_each_name(
    open_run: Open, caplog: pytest.LogCaptureFixture
) -> None:
    bytes_as_floats = np.linspace(0.0, 255.0, 16).reshape(4, 4)
    with open_run() as run:
        for _ in range(2):
            run.image("bytes", bytes_as_floats)
            run.image("normalised", torch.tensor(bytes_as_floats / 100 - 1))
            run.image("resized", bytes_as_floats / 254)
            run.image("good", bytes_as_floats / 255)
            run.image("nothing", np.full((4, 4), math.nan))
            run.step += 1
    said = [record.getMessage() for record in caplog.records if "clipped" in record.getMessage()]
    assert len(said) == 2
    assert "'bytes' has floats from 0 to 255" in said[0]
    assert "'normalised' has floats from -1 to 1.55" in said[1]


def test_a_text_that_is_none_is_named(open_run: Open) -> None:
    with open_run() as run, pytest.raises(TypeError, match="text 'said' is of type int"):
        run.text("said", 5)  # type: ignore[arg-type]


def test_figures_texts_and_histograms(open_run: Open) -> None:
    import matplotlib as mpl
    from plotly.graph_objects import Figure

    mpl.use("agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots()
    axes.plot([1, 2])
    with open_run() as run:
        run.step = 5
        run.figure("drawn", drawn)
        run.figure("plotly", Figure(data=[{"type": "bar", "y": [1, 2]}]))
        run.text("said", "once\nupon </script>")
        run.histogram("weights", torch.tensor([0.0, 1.0, 1.0, math.nan]), bins=2)
        with pytest.raises(TypeError, match="Matplotlib or Plotly"):
            run.figure("bad", 3)
        with pytest.raises(ValueError, match="is not a valid artifact name"):
            run.text("../../out", "x")
    pyplot.close(drawn)
    seen = {m.name: m for m in _seen(run).media}
    files = {name: run.directory.path / m.file["path"] for name, m in seen.items() if m.file}
    assert files["drawn"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["plotly"].read_text())["data"][0]["y"] == [1, 2]
    assert files["said"].read_text() == "once\nupon </script>"
    assert seen["weights"].about == {"edges": [0.0, 0.5, 1.0], "counts": [1, 2], "non_finite": 1}
    assert {m.step for m in seen.values()} == {5}


def test_what_is_logged_twice_at_a_step_keeps_its_first_file(open_run: Open) -> None:
    with open_run() as run:
        for text in ("first", "second", "first"):
            run.text("said", text)
    (said,) = _seen(run).media
    assert said.file is not None
    assert (run.directory.path / said.file["path"]).read_text() == "first"


# -- artifacts ---------------------------------------------------------------------------------


def test_an_artifact_of_two_runs_is_stored_once_and_collected_with_the_last(
    open_run: Open, tmp_path: Path
) -> None:
    data = tmp_path / "data.bin"
    data.write_bytes(b"x" * 100_000)
    placed = []
    for name in ("a", "b"):
        with open_run(name) as run:
            placed.append(run.artifact(data, kind="dataset"))
    assert placed[0].stat().st_ino == placed[1].stat().st_ino
    assert placed[0].stat().st_mode & 0o222 == 0
    data.write_bytes(b"changed")
    assert placed[0].read_bytes() == b"x" * 100_000
    runs = tmp_path / "runs"
    for name in ("a", "b"):
        assert artifacts.collect_garbage(runs, older_than=0) == 0
        RunDirectory(runs / "test" / name).remove()
    assert artifacts.collect_garbage(runs, older_than=0) >= 100_000  # the code of the runs is shared too
    assert not list(artifacts.store(runs).glob("*/*"))


def test_what_a_kill_left_of_a_copy_is_collected(open_run: Open, tmp_path: Path) -> None:
    data, runs = tmp_path / "data.bin", tmp_path / "runs"
    data.write_bytes(bytes(2**23))
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, 2**22))"
    copies = f"stoker.Run('test', 'a', runs='{runs}').artifact('{data}')"
    # Python ignores the signal that a file beyond the limit is answered with.
    killed = "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)"
    script = f"import resource, signal, stoker; {limit}; {killed}; {copies}"
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGXFSZ
    left = [file for file in artifacts.store(runs).glob(".*") if file.stat().st_size == 2**22]
    assert artifacts.collect_garbage(runs, older_than=0) == 0  # another process may be writing it
    size = left[0].stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        hour_later = time.time() + 3601
        patch.setattr(time, "time", lambda: hour_later)
        assert artifacts.collect_garbage(runs) >= size
    assert not [*artifacts.store(runs).glob(".*")]


def test_content_that_is_collected_just_when_it_is_linked_is_stored_again(
    open_run: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, runs = tmp_path / "data", tmp_path / "runs"
    data.write_bytes(b"x")
    with open_run("a") as run:
        run.artifact(data)
    RunDirectory(runs / "test" / "a").remove()
    link, collected = storage.link_or_copy, []

    def just_before(source: Path, target: Path) -> None:
        if not collected:
            collected.append(artifacts.collect_garbage(runs, older_than=0))
        link(source, target)

    with open_run("b") as run:
        monkeypatch.setattr(storage, "link_or_copy", just_before)
        place = run.artifact(data)
    assert collected
    assert place.read_bytes() == b"x"
    assert place.stat().st_nlink == 2


def test_a_folder_logged_again_is_replaced_and_every_version_is_on_record(
    open_run: Open, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "w").write_text("one")
    with open_run() as run:
        run.artifact(folder, name="best/model")
        (folder / "deep" / "w").write_text("two")
        (folder / "new").write_text("n")
        place = run.artifact(folder, name="best/model")
    assert place == run.directory.artifacts / "best" / "model"
    assert (place / "deep" / "w").read_text() == "two"
    assert {f["path"] for f in _seen(run).artifacts["best/model"]["files"]} == {
        "artifacts/best/model/deep/w", "artifacts/best/model/new",
    }  # fmt: skip
    versions = [e for e in journal.read(run.directory.journal) if e["type"] == "artifact"]
    assert len({json.dumps(e["files"]) for e in versions}) == 2


def test_an_artifact_s_name_may_be_as_long_as_a_file_s(open_run: Open, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with open_run() as run:
        run.artifact(tmp_path / "x", name=f"in/{'ä' * 115}")
        assert (run.directory.artifacts / "in" / ("ä" * 115)).read_text() == "x"
        with pytest.raises(ValueError, match=r"^ä{40}\.\.\. in an artifact's name has more than 230 bytes"):
            run.artifact(tmp_path / "x", name=f"in/{'ä' * 116}")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..", "a\nb", "a\\b", "."])
def test_an_artifact_that_would_leave_its_folder_is_refused(
    open_run: Open, tmp_path: Path, name: str
) -> None:
    (tmp_path / "x").write_text("x")
    with open_run() as run, pytest.raises(ValueError, match="is not a valid artifact name"):
        run.artifact(tmp_path / "x", name=name)


def test_an_artifact_that_would_replace_media_or_another_artifact_is_refused(
    open_run: Open, tmp_path: Path
) -> None:
    file, folder = tmp_path / "file", tmp_path / "images"
    file.write_text("x")
    folder.mkdir()

    def refused(run: Run) -> None:
        for source, name in (
            (folder, None),
            (file, "texts/said"),
            (file, "x"),
            (file, "x/y/z"),
            (folder, "o"),
        ):
            with pytest.raises(ValueError, match="another name"):
                run.artifact(source, name)

    with open_run() as run:
        run.text("said", "first")
        run.artifact(file, "x/y")
        (run.directory.artifacts / "o").mkdir()
        (run.directory.artifacts / "o" / "own").write_text("own")
        run.artifact(run.directory.artifacts / "o" / "own")
        run.artifact(run.directory.artifacts, "all")  # keeps nothing from being brought in
        refused(run)
        run.artifact(file, "x/y")
        run.artifact(file, "x/y2")
    with open_run() as run:
        refused(run)
        run.artifact(folder, "x/y")
        run.artifact(folder, "pictures")
    seen = _seen(run)
    assert set(seen.artifacts) == {"x/y", "x/y2", "own", "all", "pictures"}
    kept = [seen.media[0].file, *seen.artifacts["x/y2"]["files"], *seen.artifacts["own"]["files"]]
    assert all(f is not None and (run.directory.path / f["path"]).is_file() for f in kept)


def test_a_link_that_leads_out_of_the_run_is_refused(open_run: Open, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with open_run() as run:
        (run.directory.artifacts / "link").symlink_to(tmp_path / "secret")
        (run.directory.artifacts / "folder").mkdir()
        (run.directory.artifacts / "folder" / "link").symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match="leads outside the run"):
            run.artifact(run.directory.artifacts / "folder")
    assert _seen(run).artifacts == {}


def test_lineage_leads_from_the_user_to_the_maker_and_back(open_run: Open, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b\n")
    with open_run("maker") as maker:
        maker.artifact(tmp_path / "data.csv", name="clean", kind="dataset")
    with open_run("user") as user:
        by_name = user.use("maker:clean")
        by_path = user.use(maker.directory.artifacts / "clean")
        outside = user.use(tmp_path / "data.csv")
        for reference, said in (
            ("maker:clear", "did you mean 'clean'"), ("nobody:clean", "no run 'nobody'"),
            ("absent", "not exist"),
        ):  # fmt: skip
            with pytest.raises(BadInput, match=said):
                user.use(reference)
    assert by_name == by_path == maker.directory.artifacts / "clean"
    assert outside == tmp_path / "data.csv"
    used = _seen(user).used
    assert used["clean"].run is not None
    assert used["clean"].run["id"] == "maker"
    assert used["data.csv"].run is None
    assert used["clean"].files[0]["sha256"] == used["data.csv"].files[0]["sha256"]
    assert _seen(maker).used_by[0]["run"]["id"] == "user"
    assert _seen(maker).status == "finished"


def test_an_artifact_that_changed_since_it_was_recorded_is_not_used(open_run: Open) -> None:
    with open_run("maker") as maker:
        file = maker.directory.artifacts / "w"
        file.write_text("one")
        maker.artifact(file)
    file.write_text("two")
    os.utime(file, (4e9, 4e9))
    with open_run("user") as user, pytest.raises(BadInput, match="checksum differs"):
        user.use("maker:w")


# -- params, tags, notes, the machine ----------------------------------------------------------


def test_params_tags_notes_and_the_machine(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_SYNC_SECONDS", 0.01)
    with open_run(config={"lr": 0.1}) as run:
        run.params(parameters=7)
        run.note("first")
        run.note("second")
        run.note(None)  # type: ignore[arg-type]
        run.log(loss=1.0)
        _wait_for_the_machine(run)
    seen = _seen(run)
    assert seen.params == {"parameters": 7}
    assert [text for _, text in seen.notes] == ["first", "second", "None"]
    assert set(seen.system) >= {"cpu_percent", "memory_percent", "process_memory_bytes", "disk_free_bytes"}
    assert 0 < seen.system["memory_percent"][0] <= 100
    assert list(seen.points) == ["loss"]


def test_a_note_at_the_start_of_a_script_is_added_once_however_often_it_starts(open_run: Open) -> None:
    for number in range(3):
        with open_run() as run:
            run.note("the baseline")
            run.note(f"start {number}")
            run.note(f"start {number}")
            run.log(loss=1.0)
    assert [text for _, text in _seen(run).notes] == ["the baseline", "start 0", "start 1", "start 2"]


def test_a_tag_that_is_set_to_none_is_removed(open_run: Open) -> None:
    with open_run() as run:
        run.tag(team="blue", size=3)  # type: ignore[arg-type]
        run.tag(team=None, never=None)
    assert _seen(run).tags == {"size": "3"}


def test_texts_with_half_of_a_surrogate_pair_are_kept_without_it(open_run: Open) -> None:
    half = "a\ud800b"
    with open_run(config={"path": half}) as run:
        run.tag(t=half)
        run.note(half)
        run.params(p=half)
        run.text("said", half)
        run.table("cells", [{"column": half, half: 1}])
        run.image("black", np.zeros((4, 4)), caption=half)
        with pytest.raises(ValueError, match="not a valid metric name"):
            run.log({half: 1.0})
        run.log(loss=1.0)
    seen = _seen(run)
    assert (seen.tags, seen.params, [text for _, text in seen.notes]) == ({"t": "a?b"}, {"p": "a?b"}, ["a?b"])
    assert run.directory.record()["config"]["path"] == "a?b"
    assert [one.about.get("caption") for one in seen.media if one.kind == "image"] == ["a?b"]
    (table,) = (one for one in seen.media if one.kind == "table")
    assert media.read_table((run.directory.path / table.file["path"]).read_bytes()) == (
        ["column", "a?b"], [["a?b", 1]],
    )  # fmt: skip


class _Mode(enum.Enum):
    FAST = "fast"


_ARGUMENTS: dict[str, Any] = {
    "data": Path("x/y"), "rate": np.float32(0.1), "n": np.int64(3), "names": {"b", "a"},
    "kind": torch.float32, "where": torch.device("cpu"), "mode": _Mode.FAST, "mixed": {1, "a"},
    "sizes": np.arange(2),
    "scale": torch.tensor(2.0), "inside": {"path": Path("z"), "pair": (1, Path("w"))}, "nan": math.nan,
}  # fmt: skip
_RECORDED = {
    "data": "x/y", "rate": float(np.float32(0.1)), "n": 3, "names": ["a", "b"], "kind": "torch.float32",
    "where": "cpu", "mode": "fast", "mixed": [1, "a"], "sizes": [0, 1], "scale": 2.0,
    "inside": {"path": "z", "pair": [1, "w"]}, "nan": "nan",
}  # fmt: skip


def test_what_a_parser_of_arguments_gives_is_recorded_and_is_no_drift(open_run: Open) -> None:
    for _ in range(2):
        with open_run(config=_ARGUMENTS) as run:
            run.params(**{f"later_{key}": value for key, value in _ARGUMENTS.items()})
            run.log(loss=1.0)
    seen = _seen(run)
    assert seen.config == _RECORDED
    assert seen.params == {f"later_{key}": value for key, value in _RECORDED.items()}
    assert seen.drift == {}


def test_a_value_that_cannot_be_recorded_is_refused_by_its_key(open_run: Open) -> None:
    with pytest.raises(TypeError, match=r"config: 'activation' is .*cannot be recorded"):
        open_run(config={"activation": math.sin})
    with open_run() as run, pytest.raises(TypeError, match=r"params: 'what' is .*cannot be recorded"):
        run.params(what=object())


def test_of_a_folder_that_is_gone_the_machine_is_still_known(tmp_path: Path) -> None:
    found = SystemSampler(tmp_path / "gone").sample()
    assert "memory_percent" in found
    assert "disk_free_bytes" not in found


def test_of_a_run_that_is_over_at_once_the_machine_says_nothing(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_SYNC_SECONDS", 3600.0)  # within which it is over on any machine
    with open_run() as run:
        run.log(loss=1.0)
    assert _seen(run).system == {}


def _wait_for_the_machine(run: Run) -> None:
    until(lambda: run.attempt._background._system is not None)


def test_a_resume_voids_media_and_points_but_not_what_the_machine_did(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_SYNC_SECONDS", 0.01)
    monkeypatch.setattr(
        background, "_SYSTEM_SECONDS", 3600.0
    )  # it is sampled at the end of each attempt alone
    with open_run() as run:
        for step in range(1, 6):
            run.log(loss=float(step))
            run.text("said", f"step {step}")
        _wait_for_the_machine(run)
    with open_run() as run:
        run.attempt.resumed(2)
        assert run.latest == {"loss": 2.0}
        run.log(loss=30.0, step=3)
        _wait_for_the_machine(run)
    seen = _seen(run)
    assert seen.points["loss"] == {1: 1.0, 2: 2.0, 3: 30.0}
    assert [m.step for m in seen.media] == [1, 2]
    assert list(seen.system["cpu_percent"]) == [0, 1]


# -- watching a model --------------------------------------------------------------------------


def test_a_watch_sees_gradients_and_parameters_without_a_trainer(open_run: Open) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    with open_run() as run:
        run.watch(model, every=2, histograms=True, bins=4)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(5, 3)).square().mean().backward()
            assert model.weight.grad is not None
            norms.append((model.weight.grad.norm().item(), model.weight.norm().item()))
            optimizer.step()
            run.log(loss=1.0)
    optimizer.step()  # nobody watches any more
    seen = _seen(run)
    assert seen.points["gradients/weight"] == pytest.approx({1: norms[0][0], 3: norms[2][0]})
    assert seen.points["gradient_norm"] == pytest.approx({1: norms[0][0], 3: norms[2][0]})
    assert seen.points["parameters/weight"] == pytest.approx({1: norms[0][1], 3: norms[2][1]})
    assert not any("bias" in name for name in seen.points)
    histograms = {(m.name, m.step): m.about for m in seen.media}
    assert set(histograms) == {(f"{kind}/weight", s) for kind in ("gradients", "parameters") for s in (1, 3)}
    first = histograms["parameters/weight", 1]
    assert sum(first["counts"]) == 6
    assert len(first["edges"]) == 5


def test_a_watch_counts_on_in_a_continued_run_without_a_trainer(open_run: Open) -> None:
    model = torch.nn.Linear(1, 1)
    for last in (4, 10):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with open_run() as run:
            run.watch(model, every=3)
            for _ in range(run.step, last):
                model(torch.ones(1, 1)).sum().backward()
                optimizer.step()
                run.log(loss=1.0)
    assert list(_seen(run).points["gradient_norm"]) == [1, 4, 7, 10]


def test_a_watch_of_a_gradient_without_a_finite_value_sees_an_empty_histogram(open_run: Open) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with open_run() as run:
        run.watch(model, every=1, histograms=True, bins=2)
        model(torch.full((1, 3), math.nan)).sum().backward()
        optimizer.step()
        run.log(loss=1.0)
    histograms = {m.name: m.about for m in _seen(run).media}
    assert histograms["gradients/weight"] == {"edges": [0.0, 0.5, 1.0], "counts": [0.0, 0.0]}


def test_a_watch_sees_what_each_optimizer_of_a_step_does(open_run: Open) -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 1, bias=False) for name in ("a", "b")})
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in model.values()]
    with open_run() as run:
        run.watch(model, every=1, histograms=True)
        for together in (True, True, False):
            for (name, part), optimizer in zip(model.items(), optimizers, strict=True):
                optimizer.zero_grad()
                (part(torch.ones(1, 2)).sum() * {"a": 3.0, "b": 4.0}[name] / 2**0.5).backward()
                optimizer.step()
                if not together:
                    run.log({f"loss_{name}": 1.0})
            if together:
                run.log(loss=1.0)
    seen = _seen(run)
    assert seen.points["gradients/a.weight"] == pytest.approx({1: 3.0, 2: 3.0, 3: 3.0})
    assert seen.points["gradients/b.weight"] == pytest.approx({1: 4.0, 2: 4.0, 4: 4.0})
    assert seen.points["gradient_norm"] == pytest.approx({1: 5.0, 2: 5.0, 3: 3.0, 4: 5.0})
    assert {(m.name, m.step) for m in seen.media if m.step == 1} == {
        (f"{kind}/{name}.weight", 1) for kind in ("gradients", "parameters") for name in ("a", "b")
    }


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 2.0, 5.0], [3.0, 3.0], [0.0, math.nan, 1.0, math.inf], [math.nan]]
)
def test_a_watchs_histogram_is_numpys(values: list[float]) -> None:
    from stoker.engine.watch import histogram

    low, high, counts = histogram(torch.tensor(values), 4)
    finite = np.array([v for v in values if math.isfinite(v)])
    if len(finite) and finite.min() < finite.max():
        wanted, edges = np.histogram(finite, bins=4)
        assert counts.tolist() == wanted.tolist()
        assert (low.item(), high.item()) == (edges[0], edges[-1])
    assert counts.sum() == len(finite)


# -- several processes -------------------------------------------------------------------------

RANKS = """
import os, sys, time, stoker
with stoker.Run("test", "ranks", runs=sys.argv[1]) as run:
    rank = run.world.rank
    while len(list(run.directory.journal.glob(f"attempt-{run.attempt.number:04d}.*"))) < run.world.size:
        time.sleep(0.01)  # as training does, where every rank waits for all others to begin
    for step in range(1, 51):
        run.log(loss=float(step + rank), reduce="mean")
        run.log({"peak": float(step * rank), "total": 1.0}, step=step, reduce="max")
        run.log(step=step, of_rank_0=float(rank))
    run.log(step=50, count=2.0, reduce="sum")
    run.log(step=51, alone=1.0, **({"reduce": "sum"} if rank == 1 else {}))
    run.text("said", str(rank)); run.tag(rank=rank)
    if rank: os._exit(0)
"""


def test_values_that_are_reduced_have_a_step_where_ranks_differ_in_what_they_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    with Run("test", "a", runs=tmp_path) as run:
        run.log(loss=1.0, reduce="mean")
        run.log(val_loss=2.0, step=1)
        run.log(loss=1.0, reduce="mean")
        run.log(test_loss=2.0)  # at the end, for example
        with pytest.raises(ValueError, match="give step= to every"):
            run.log(loss=1.0, reduce="mean")
        run.attempt.end("failed")


def _launch(tmp_path: Path, launch: str, ranks: int = 3) -> list[subprocess.Popen[bytes]]:
    environment = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": launch,
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path)], env={**os.environ, **environment, "RANK": str(r)}
        )
        for r in reversed(range(ranks))
    ]


def test_metrics_are_reduced_over_ranks_and_the_rest_is_rank_0s(tmp_path: Path) -> None:
    for launch in ("one", "two"):  # ranks of the second never join the attempt of the first
        for process in _launch(tmp_path, launch):
            assert process.wait(LONG) == 0
    seen = view.load(RunDirectory(tmp_path / "test" / "ranks"))
    assert [a.world for a in seen.attempts] == [3, 3]
    of_both = {s + begun: s + 1.0 for begun in (0, 51) for s in range(1, 51)}  # the second goes on counting
    assert seen.points["loss"] == of_both
    assert seen.points["peak"] == {s: 2.0 * s for s in range(1, 51)}
    assert set(seen.points["of_rank_0"].values()) == {0.0}
    assert seen.points["count"] == {50: 6.0}
    assert seen.points["alone"] == {51: 1.0}
    assert seen.tags == {"rank": "0"}
    assert sorted(p.name for p in seen.directory.logs.glob("rank-*")) == [f"rank-{r}.log" for r in range(3)]


def test_ranks_of_a_script_may_record_what_is_their_own_but_must_run_the_same_code(tmp_path: Path) -> None:
    text = (
        "import os, sys, time, stoker\n"
        "config = {'device': os.environ['RANK'], 'lr': 1}\n"
        "with stoker.Run('test', 'a', runs=sys.argv[1], config=config) as run:\n"
        "    run.log(loss=1.0, reduce='sum')\n"
    )
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "train.py").write_text(text)
    codes, said = _copies(tmp_path)
    assert codes == [0, 0], said
    assert "config differs from that of rank 0 (there): device is 1 here and 0 there" in said[1]

    (tmp_path / "1" / "train.py").write_text(f"{text}print()\n")
    (tmp_path / "0" / "train.py").write_text(f"{text}time.sleep(600)\n")
    codes, said = _copies(tmp_path)
    assert codes == [2, 1]
    for one in said:
        assert re.search("the code of rank 1 on .* differs from that of rank 0 on .*: train.py;", one)


def _copies(folder: Path) -> tuple[list[int], list[str]]:
    """Two ranks that each run `train.py` in a folder of their own; exit codes and output."""
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", str(folder / "runs")], cwd=folder / str(rank),
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=LONG)[0] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.parametrize(
    ("told", "local", "machines"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8"}, (0, 1), 8),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (1, 4), 2),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}, (5, 8), 1),
    ],
)
def test_a_rank_of_whose_machine_nothing_is_said_has_it_to_itself(
    told: dict[str, str], local: tuple[int, int], machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Kubeflow's PyTorchJob, whose pods have one GPU each."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    world = World.current()
    assert ((world.local_rank, world.local_size), world.machines) == (local, machines)


def test_several_processes_without_a_name_agree_on_their_launchers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="give it a name"):
        Run("test", runs=tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    with Run("test", runs=tmp_path) as first:
        pass
    with Run("test", runs=tmp_path) as again:
        pass
    assert first.directory == again.directory


# -- the compacted form ------------------------------------------------------------------------


def test_the_compacted_form_is_the_fold_and_follows_the_journal(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "_WORTH_IT", 1)
    with open_run(config={"lr": 0.1}) as run:
        for step in range(1, 4):
            run.log(loss=float(step), odd=math.nan)
        run.text("said", "x")
        run.note("n")
        run.attempt.event("skipped", step=2, samples=[2, 3], reason="the loss is nan")
        run.goal(odd="max")
        run.artifact(run.directory.record_file, name="record")
        run.use(__file__)
    folded = view.fold(run.directory, run.directory.record())
    first = view.load(run.directory)
    assert run.directory.compacted.is_file()
    second = view.load(run.directory)
    for one in (first, second):
        assert {**vars(one), "points": 0, "system": 0} == {**vars(folded), "points": 0, "system": 0}
        assert one.points["loss"] == folded.points["loss"]
        assert (one.points["loss"].time == folded.points["loss"].time).all()
        assert one.system.keys() == folded.system.keys()
    writer = journal.control(run.directory.journal)
    writer.append("tags", tags={"new": "tag"})
    writer.close()
    assert view.load(run.directory).tags == {"new": "tag"}
    run.directory.compacted.write_bytes(b"damaged")
    assert view.load(run.directory).points["loss"] == folded.points["loss"]


def test_a_run_with_a_seed_seeds_what_a_script_draws(tmp_path: Path) -> None:
    def drawn(**seed: int) -> tuple[float, float, float]:
        random.seed(7)
        with Run("test", runs=tmp_path, **seed):
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn()[0] == random.Random(7).random(), "without one nothing is seeded"
