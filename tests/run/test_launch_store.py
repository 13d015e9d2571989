"""What ranks of several machines tell each other at torchrun's store if they share no folder."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch.distributed as dist
from stoker.run import launch_store
from stoker.run.directory import RunDirectory
from stoker.run.launch_store import LaunchStore
from stoker.world import World

Of = Callable[..., tuple[RunDirectory, LaunchStore]]
TWO = World(rank=1, size=2, machines=2, launch="job/0")


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Of:
    """A rank's view of the run, by its machine's folder; the store is a real one."""
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agents.port))
    monkeypatch.setattr(launch_store, "_SEEN_WITHIN", 0.0)
    kept = [agents]

    def made(machine: str, world: World = TWO, run: str = "a") -> tuple[RunDirectory, LaunchStore]:
        assert kept
        directory = RunDirectory(tmp_path / machine / "runs" / "x" / run)
        return directory, LaunchStore(world, directory)

    return made


def _open(run: RunDirectory, launch: str = TWO.launch) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    run.lock_file.write_bytes(orjson.dumps({"id": "mark", "launch": launch}))


def test_a_rank_that_does_not_see_what_rank_zero_has_opened_refuses_and_rank_zero_hears_it(of: Of) -> None:
    run, first = of("one")
    _, second = of("two")
    assert second.refuse_unshared() == "", "rank 0 may still be on its way"
    _open(run)
    first.say_opened()
    said = second.refuse_unshared()
    assert f"has opened {run.path}, which is not there on" in said
    assert said.endswith(launch_store.SHARE)
    assert first.refusal() == said


def test_an_older_copy_of_the_run_is_not_what_rank_zero_has_opened(of: Of) -> None:
    run, first = of("one")
    copy, second = of("two")
    _open(copy, "another job/0")
    _open(run)
    first.say_opened()
    assert second.refuse_unshared()


def test_a_rank_that_sees_the_run_waits_for_its_next_attempt_or_another_run_as_long_as_it_takes(
    of: Of,
) -> None:
    run, first = of("shared")
    _, second = of("shared")
    _open(run)
    first.say_opened()
    assert second.refuse_unshared() == "", "rank 0 may open it again"
    _, third = of("shared", run="b")
    assert third.refuse_unshared() == "", "rank 0 has not opened that one"
    first.say_closed()
    shutil.rmtree(run.path)  # an opening that came to nothing leaves nothing behind
    assert second.refuse_unshared() == "", "rank 0 may open it again"
    assert first.refusal() == ""


def test_without_several_machines_or_an_answer_nothing_is_said(
    of: Of, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, alone = of("one", World(rank=1, size=2, launch="job/0"))
    _open(run)
    alone.say_opened()
    _, second = of("two")
    assert second.refuse_unshared() == ""
    monkeypatch.setattr(launch_store, "_ANSWERS_WITHIN", datetime.timedelta(seconds=0.2))
    monkeypatch.setenv("MASTER_PORT", "9")
    _, lost = of("two")
    lost.say_opened()
    assert lost.refusal() == ""
