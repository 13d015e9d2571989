from __future__ import annotations

import argparse
import contextlib
import datetime
import enum
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stoker
import torch
from stoker import BadInput, Run, Training
from stoker.report import facts, run_difference
from stoker.run import finding, media, view
from stoker.run.directory import RunDirectory
from stoker.status import FAILED, FINISHED, INTERRUPTED, KILLED, STOPPED
from stoker.supervision import Heart

from support import SOAK


@pytest.fixture
def open_run(tmp_path: Path) -> Callable[..., Run]:
    return lambda name="a", **options: Run("test", name, runs=tmp_path / "runs", **options)


def test_numbers_tensors_and_nested_values_are_logged(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        run.log(a=1, b=torch.tensor(0.5), c=np.float32(0.25), d=torch.tensor([2.0]), e=True, f=math.nan)
        run.log({"val": {"loss": 0.1, "deep": {"er": 2}}}, g=3)
    points = view.load(run.directory).points
    assert {m: list(s.items()) for m, s in points.items() if m != "f"} == {
        "a": [(1, 1)], "b": [(1, 0.5)], "c": [(1, 0.25)], "d": [(1, 2)], "e": [(1, 1)],
        "val/loss": [(2, 0.1)], "val/deep/er": [(2, 2)], "g": [(2, 3)],
    }  # fmt: skip
    assert math.isnan(points["f"][1])


def test_who_compares_trials_is_told_nested_values_by_their_names(open_run: Callable[..., Run]) -> None:
    told: list[dict[str, Any]] = []
    with open_run() as run:
        run.attempt.listen(lambda step, values: told.append({"step": step, **values}), ["val/loss"])
        run.log({"val": {"loss": 0.1}}, lr=1)
    assert told == [{"step": 1, "val/loss": 0.1, "lr": 1}]


@pytest.mark.filterwarnings("error")
def test_a_loss_is_logged_with_its_graph_and_without_a_warning(open_run: Callable[..., Run]) -> None:
    weight = torch.ones((), requires_grad=True)
    with open_run() as run:
        run.log(loss=weight * 2)
    assert view.load(run.directory).points["loss"] == {1: 2.0}


def test_the_names_of_the_package_and_of_a_run_are_seen_at_a_prompt(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        assert repr(run) == "Run('test', 'a')"
    assert set(stoker.__all__) <= set(dir(stoker))


def test_a_tensor_is_logged_as_it_was_when_it_was_logged(open_run: Callable[..., Run]) -> None:
    total = torch.tensor(1.0)
    with open_run() as run:
        run.log(total=total)
        total += 5
    assert view.load(run.directory).points["total"] == {1: 1.0}


def test_what_cannot_be_logged_is_refused_at_the_call(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        with pytest.raises((TypeError, ValueError)):
            run.log(a="text")
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            run.log(a=torch.ones(3))
        with pytest.raises(ValueError, match="'step' cannot be a metric name"):
            run.log({"step": 3})
        run.log(a=1)
    assert view.load(run.directory).points == {"a": {3: 1.0}} or view.load(run.directory).points["a"]


def test_steps_can_be_named(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        run.log(a=1, step=10)
        run.log(a=2, step=20)
    assert view.load(run.directory).points["a"] == {10: 1, 20: 2}


def test_a_run_opened_again_goes_on_counting(open_run: Callable[..., Run]) -> None:
    for _ in range(2):
        with open_run() as run:
            run.log(a=1)
    assert list(view.load(run.directory).points["a"]) == [1, 2]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"),
        (RuntimeError("x"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(), "finished"),
        (SystemExit(0), "finished"),
        (SystemExit(3), "failed"),
        (SystemExit("bad data"), "failed"),
    ],
)
def test_how_a_run_ends_is_its_status(
    open_run: Callable[..., Run], error: BaseException | None, status: str
) -> None:
    with contextlib.suppress(BaseException), open_run() as run:
        if error is not None:
            raise error
    assert view.load(run.directory).status == status


def test_an_empty_variable_names_no_folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compose files and CI leave it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STOKER_RUNS", "")
    with Run("test", "a") as run:
        run.log(loss=1.0)
    assert run.directory.path == tmp_path / "runs" / "test" / "a"
    assert [seen.directory.id for seen in stoker.runs("test")] == ["a"]


def test_a_run_whose_record_a_power_cut_emptied_is_none_and_is_begun_anew(
    open_run: Callable[..., Run], tmp_path: Path
) -> None:
    with open_run(config={"lr": 0.1}) as run:
        run.log(loss=1.0)
    run.directory.record_file.write_bytes(b"")
    assert not run.directory.exists()
    assert finding.every(run.directory.path.parents[1]) == []
    with open_run(config={"lr": 0.2}) as again:
        again.log(loss=0.5)
    assert not again.continued
    assert view.load(again.directory).config == {"lr": 0.2}


@pytest.mark.parametrize(
    ("last", "code", "ended"),
    [
        ("", 0, (FINISHED, None)),
        ("raise ValueError('no')", 1, (FAILED, "ValueError: no")),
        ("raise KeyboardInterrupt", -signal.SIGINT, (INTERRUPTED, None)),
        ("run.close()", 0, (KILLED, None)),
        ("run.end('stopped'); run.close()", 0, (STOPPED, None)),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, (KILLED, None)),
    ],
)
def test_a_run_without_a_block_ends_with_the_script(
    tmp_path: Path, last: str, code: int, ended: tuple[str, str | None]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os, stoker\nrun = stoker.Run('test', 'a')\nrun.log(loss=1.0)\n{last}\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=False, stderr=subprocess.DEVNULL)
    assert done.returncode == code
    run = view.load(RunDirectory(tmp_path / "runs" / "test" / "a"))
    assert (run.status, run.attempts[-1].error) == ended
    assert run.points["loss"] == {1: 1.0}


UNGUARDED = """
import stoker, torch
from torch.utils.data import TensorDataset

class Config(stoker.Training):
    pass

def train(run: stoker.Run, config: Config) -> None:
    model = torch.nn.Linear(1, 1)
    made = dict(optimizer=torch.optim.SGD, loss=lambda out, batch: (out.sum(), len(out)))
    trainer = stoker.Trainer(run, model, training=config, **made)
    loader = trainer.loader(Data(torch.ones(4, 1)), batch_size=2, workers=1)
    for batch in trainer.steps(loader, max_steps=1):
        run.log(loss=trainer.step(batch))

class Data(TensorDataset):
    pass
"""


STARTS = [
    ("with stoker.Run('test') as run: train(run, Config())", False),
    ("with stoker.Run('test', 'a') as run: train(run, Config())", True),
    ("with stoker.Run('test', 'a') as run: train(run, Config())", False),
    ("stoker.main(train)", False),
]


@pytest.mark.soak
@pytest.mark.parametrize(("start", "guarded"), STARTS if SOAK else STARTS[1:2])
def test_a_script_that_its_own_workers_would_run_is_told_of_the_guard(
    tmp_path: Path, start: str, guarded: bool
) -> None:
    script = tmp_path / "test.py"
    guard = 'if __name__ == "__main__":\n    ' if guarded else ""
    script.write_text(f"{UNGUARDED}\n{guard}{start}\n")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert (done.returncode == 0) == guarded, done.stderr
    assert ('below `if __name__ == "__main__":`' in done.stderr) == (not guarded), done.stderr
    assert "another process is training" not in done.stderr
    assert len(list((tmp_path / "runs" / "test").iterdir())) == 1


def test_tables_tags_and_artifacts_are_recorded(open_run: Callable[..., Run], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.txt").write_text("hello")
    with open_run() as run:
        run.step = 4
        run.table("t", [(1, "x"), (2, "y")], ["a", "b"])
        run.tag(team="blue", size=3)
        (run.directory.artifacts / "own.txt").write_text("own")
        run.artifact(run.directory.artifacts / "own.txt")
        placed = run.artifact(outside, kind="data")
        with pytest.raises(FileNotFoundError):
            run.artifact(tmp_path / "none")
    assert (placed / "x.txt").read_text() == "hello"
    assert placed.is_relative_to(run.directory.artifacts)
    seen = view.load(run.directory)
    (table,) = seen.media
    assert (table.kind, table.name, table.step, table.about) == (
        "table",
        "t",
        4,
        {"columns": ["a", "b"], "rows": 2},
    )
    assert table.file is not None
    rows = media.read_table((run.directory.path / table.file["path"]).read_bytes())
    assert rows == (["a", "b"], [[1, "x"], [2, "y"]])
    assert seen.tags == {"team": "blue", "size": "3"}
    (file,) = seen.artifacts["outside"]["files"]
    assert file["path"] == "artifacts/outside/x.txt"
    assert file["size"] == 5
    assert file["sha256"] == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


def test_a_changed_fingerprint_warns(open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    for value in ("one", "one", "two", "two", "one"):
        with open_run() as run:
            run.fingerprint("data", value)
    warning = "data has changed since the run began (one, now two)"
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [warning] * 2
    assert view.load(run.directory).tags == {"fingerprint.data": "one", "changed.data": "two"}


def test_another_config_is_refused_and_takes_no_attempt(open_run: Callable[..., Run]) -> None:
    with open_run(config={"lr": 1}) as run:
        pass
    with pytest.raises(BadInput, match="lr was 1 and is 2 now"):
        open_run(config={"lr": 2})
    assert len(view.load(run.directory).attempts) == 1
    with open_run(config={"lr": 2}, accept_drift=True):
        pass
    assert view.load(run.directory).config == {"lr": 2}


def test_a_key_that_is_new_since_is_no_drift(open_run: Callable[..., Run]) -> None:
    with open_run(config={"lr": 1}):
        pass
    with open_run(config={"lr": 1, "new": 0}) as run:
        pass
    assert view.load(run.directory).status == "finished"


def test_a_run_that_this_process_has_open_is_to_be_closed_before_it_is_opened_again(
    open_run: Callable[..., Run],
) -> None:
    run = open_run()
    for _ in range(2):  # a notebook's cell that is run again, and again
        with pytest.raises(BadInput, match=r"this process already has .* open: call run.close\(\)"):
            open_run()
    run.close()
    with open_run() as again:
        assert again.continued


def test_two_processes_cannot_train_one_run(open_run: Callable[..., Run], tmp_path: Path) -> None:
    code = f"import stoker; stoker.Run('test', 'a', runs={str(tmp_path / 'runs')!r})"
    with open_run():
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "another process is training" in done.stderr


def test_how_long_the_end_of_a_run_takes_is_not_limited(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        run.attempt.heart = heart = Heart(limit=60.0)  # a search's, of a loop without a Trainer
        heart.begin(0)
        heart.beat(1)
        assert heart.pulse.limit == 60.0
        run.end(FINISHED)
        heart.beat(2)
        assert heart.pulse.limit == 0.0


def test_an_unused_run_is_discarded_and_a_used_one_kept(open_run: Callable[..., Run]) -> None:
    unused, used = open_run("unused"), open_run("used")
    used.log(a=1)
    for run in (unused, used):
        run.attempt.discard_if_unused()
    assert not unused.directory.path.exists()
    assert used.directory.path.exists()


@pytest.mark.parametrize("is_closed", [False, True])
def test_an_unused_run_that_another_process_has_opened_since_is_kept(
    open_run: Callable[..., Run], is_closed: bool
) -> None:
    unused = open_run()
    unused.close()
    other = open_run()
    if is_closed:
        other.log(a=1)
        other.close()
    unused.attempt.discard_if_unused()
    if not is_closed:
        other.log(a=1)
        other.close()
    assert view.load(other.directory).points["a"] == {1: 1.0}


def test_an_unused_run_is_discarded_after_it_was_closed_too(open_run: Callable[..., Run]) -> None:
    unused = open_run()
    unused.close()
    unused.attempt.discard_if_unused()
    assert not unused.directory.path.exists()
    unused.attempt.discard_if_unused()


def test_the_config_may_be_a_dataclass_and_the_run_needs_no_torch(tmp_path: Path) -> None:
    code = """
import sys, dataclasses, stoker
@dataclasses.dataclass
class Config:
    depth: int = 3
with stoker.Run("digits", "a", config=Config()) as run:
    for depth in range(3):
        run.log(accuracy=depth / 3)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    seen: Any = view.load(Run("digits", "a", runs=tmp_path / "runs", config={"depth": 3}).directory)
    assert seen.points["accuracy"] == {1: 0.0, 2: 1 / 3, 3: 2 / 3}
    assert seen.record["config"] == {"depth": 3}


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """No file grows within this block, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_whose_end_could_not_be_written_may_be_continued(open_run: Callable[..., Run]) -> None:
    run = open_run()
    run.log(loss=1.0)
    with no_room(), pytest.raises(OSError, match="too large"):
        run.__exit__(None, None, None)
    with open_run() as run:
        run.log(loss=2.0)
    assert view.load(run.directory).points["loss"] == {1: 1.0, 2: 2.0}


def test_a_run_that_could_not_be_opened_may_be_opened_again(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        run.log(loss=1.0)
    with no_room(), pytest.raises(BadInput, match="cannot be written"):
        open_run()
    shutil.rmtree(run.directory.journal)
    for _ in range(2):  # no attempt can be begun
        with pytest.raises(BadInput, match="has no journal"):
            open_run()
    run.directory.journal.mkdir()
    open_run().close()


def test_a_run_whose_logs_were_tidied_up_goes_on(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        run.log(loss=1.0)
    shutil.rmtree(run.directory.logs)
    with open_run() as run:
        run.log(loss=2.0)
    assert (run.directory.logs / "rank-0.log").exists()


def test_a_point_that_there_was_no_room_for_is_written_once_there_is(open_run: Callable[..., Run]) -> None:
    with open_run() as run:
        run.log(loss=1.0)
        with no_room(), pytest.raises(OSError, match="too large"):
            run.log(loss=torch.tensor(2.0))
        run.log(loss=3.0)
    assert view.load(run.directory).points["loss"] == {1: 1.0, 2: 2.0, 3: 3.0}


FORKS = """
import os, sys, stoker
with stoker.Run("test", "a", runs=sys.argv[1]) as run:
    run.log(loss=1.0)
    if os.fork() == 0:
        sys.exit(3)
    assert os.wait()[1] >> 8 == 3
    run.log(loss=2.0)
    os._exit(0)
"""


LEAVES = """
import sys, stoker, torch
run = stoker.Run("test", "a", runs=sys.argv[1])
trainer = stoker.Trainer(
    run, torch.nn.Linear(1, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    loss=lambda output, batch: (output.sum(), len(output)), training=stoker.Training(precision="fp32"),
)
data = torch.utils.data.TensorDataset(torch.ones(8, 1))
for batch in trainer.steps(trainer.loader(data, batch_size=4), max_steps=9):
    trainer.step(batch)
    if run.step == 3:
        break
if sys.argv[2] == "end":
    run.end("finished")
    run.close()
if sys.argv[2] == "raise":
    raise SystemError
"""


@pytest.mark.soak
@pytest.mark.parametrize("way", ["", "end", "raise"] if SOAK else ["raise"])
def test_a_loop_that_is_left_is_saved_where_the_run_ends_without_a_block(way: str, tmp_path: Path) -> None:
    environment = {**os.environ, "STOKER_SINKS": "none"}
    command = [sys.executable, "-c", LEAVES, str(tmp_path), way]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode == 0) == (way != "raise"), done.stderr
    run = RunDirectory(tmp_path / "test" / "a")
    assert view.load(run).status == (FAILED if way == "raise" else FINISHED)
    assert [path.name for path in run.checkpoints.glob("*")] == ["step-00000003"] * (way != "raise")


def test_a_process_made_by_fork_that_leaves_the_block_ends_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKS, str(tmp_path)], check=True)
    run = view.load(RunDirectory(tmp_path / "test" / "a"))
    assert (run.status, run.points["loss"]) == (KILLED, {1: 1.0, 2: 2.0})


@pytest.mark.parametrize(
    ("recipe", "way"),
    [
        ({"name": "r", "reference": "r.py:train"}, "`stoker resume a note= limit=none`, or"),
        (None, r"stoker.Run\(..., accept_drift=True\), or"),
    ],
)
def test_a_refused_config_says_empty_values_and_what_to_do(
    open_run: Callable[..., Run], recipe: dict[str, str] | None, way: str
) -> None:
    with open_run(config={"note": "first", "limit": 3}, recipe=recipe) as run:
        run.log(a=1)
    with pytest.raises(BadInput, match=f"note was first and is '' now, limit was 3 and is none now.*{way}"):
        open_run(config={"note": "", "limit": None}, recipe=recipe)
    with open_run(config={"note": "", "limit": None}, recipe=recipe, accept_drift=True) as run:
        run.log(a=1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (argparse.Namespace(lr=1), r"config is a Namespace: .*vars\(arguments\)"),
        (Training, "config is the class Training: "),
        ({"lr": 0.1, "data": Path}, "config: 'data' is .*Path.*, of a type that cannot be recorded"),
        ({1: 2}, "config: 1 is 2, .*keys must be strings"),
    ],
)
def test_a_config_that_cannot_be_written_down_is_named(
    open_run: Callable[..., Run], tmp_path: Path, config: Any, said: str
) -> None:
    with pytest.raises(TypeError, match=said):
        open_run(config=config)
    assert not (tmp_path / "runs").exists()


class Kind(enum.Enum):
    SMALL = "small"


def test_a_config_of_values_that_json_has_not_is_the_same_when_it_is_read_again(
    open_run: Callable[..., Run],
) -> None:
    config = {
        "limit": math.inf, "least": -math.inf, "none": math.nan, "day": datetime.date(2026, 1, 1),
        "kind": Kind.SMALL, "betas": (0.9, math.inf), "inner": {"limit": math.inf},
    }  # fmt: skip
    for attempt in (1, 2):
        with open_run(config=config) as run:
            assert run.attempt.number == attempt
            run.log(a=1.0)
    with pytest.raises(BadInput, match=r"limit was inf and is 1\.0 now"):
        open_run(config={**config, "limit": 1.0})


@pytest.mark.parametrize("again", [lambda run: run.log(a=2.0), lambda run: run.tag(b="c")])
def test_logging_to_a_run_that_has_ended_says_so(
    open_run: Callable[..., Run], again: Callable[[Run], None]
) -> None:
    with open_run() as run:
        run.log(a=1.0)
    with pytest.raises(ValueError, match="this run has ended: log within its `with` block"):
        again(run)
    assert view.load(run.directory).points["a"] == {1: 1.0}


def test_a_notebook_ends_a_run_without_a_block(open_run: Callable[..., Run]) -> None:
    run = open_run()
    run.log(a=1.0)
    run.end("finished")
    run.close()
    assert view.load(run.directory).status == FINISHED
    open_run().close()  # its lock is free


def test_code_that_has_changed_since_the_run_began_is_said_once_and_recorded(
    open_run: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "code/train.py"
    script.parent.mkdir()
    texts = ["import os\n", "import os\n", "import sys\n", "import sys\n", "import os\n"]
    warned = []
    for text in texts:
        script.write_text(text)
        caplog.clear()
        with open_run(code=script) as run:
            run.log(a=1)
        warned.append([r.getMessage() for r in caplog.records if "the code has changed" in r.getMessage()])
    assert [len(said) for said in warned] == [0, 0, 1, 0, 0]
    assert "(train.py)" in warned[2][0]
    seen = view.load(run.directory)
    assert [list(attempt.code) for attempt in seen.attempts] == [[], [], ["train.py"], ["train.py"], []]
    unknown = run_difference.compare(seen, seen).unknown
    assert "code: a resumed with different code in attempt 3: train.py changed" in unknown
    notes = [facts.attempt_notes(seen, attempt) for attempt in seen.attempts]
    assert notes == [[], [], ["code: train.py changed"], [], ["code: back to that of the run's start"]]


def test_a_continued_run_that_logs_without_a_step_says_where_it_goes_on(
    open_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    for name, options in (("named", {"step": 3}), ("asked", {}), ("counted", {})):
        with open_run(name) as run:
            run.log(a=1)
            run.log(a=2)
        assert "is continued" not in caplog.text
        with open_run(name) as run:
            if name == "asked":
                assert run.step == 2
            run.text("said", "this asks for no step")
            run.log({"a": 3}, **options)
            run.log({"a": 4}, **options)
            run.log(b=5)
    assert [message for message in caplog.messages if "is continued" in message] == [
        "run 'counted' is continued, at step 3: begin the loop at run.step, or use another name for a new run"
    ]
