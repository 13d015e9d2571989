"""`stoker doctor`, whole."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from commands import SECRET, Command, Start
from servers import free_port
from support import LONG, until

AREAS = ["software", "machine", "compute", "ranks", "runs", "disk", "trackers", "hub", "launchers"]


@pytest.fixture
def alone() -> Iterator[dict[str, str]]:
    """An environment by which everything that a command leaves behind can be found."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield {"TMPDIR": folder, "STOKER_TEST_MARK": uuid.uuid4().hex}


def _left(folder: Path, env: dict[str, str]) -> list[Any]:
    """Files and processes that are there after a command; processes that end are waited for."""
    deadline = time.monotonic() + LONG
    while (living := [p for p in psutil.process_iter() if _is_of(p, env)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [*folder.rglob("*"), *Path(env["TMPDIR"]).rglob("*"), *living]


def _is_of(process: psutil.Process, env: dict[str, str]) -> bool:
    try:
        found = process.environ().get("STOKER_TEST_MARK") == env["STOKER_TEST_MARK"]
        return found and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
    except psutil.Error:
        return False


def test_a_machine_is_looked_at_in_order_and_left_as_it_was(
    stoker: Command, tmp_path: Path, alone: dict[str, str]
) -> None:
    done = stoker("doctor", env=alone)
    *rows, summary = [line.split(None, 2) for line in done.out.splitlines()]
    assert list(dict.fromkeys(area for _, area, _ in rows)) == AREAS
    states = [state for state, _, _ in rows]
    assert set(states) <= {"ok", "note", "problem"}
    assert done.code == ("problem" in states)
    count = states.count("problem")
    assert summary[:2] == ([str(count), f"problem{'s' * (count > 1)},"] if count else ["no", "problem,"])
    said = {area: (state, text) for state, area, text in rows}
    assert said["ranks"][0] == "ok"
    assert said["ranks"][1].startswith("2 ranks with gloo connect in")
    assert said["hub"][1].startswith("HF_HUB_OFFLINE is set")
    assert not _left(tmp_path, alone)
    assert not done.err


def test_problems_say_what_to_do_without_secrets_as_json_and_by_the_exit_code(
    stoker: Command, tmp_path: Path, alone: dict[str, str]
) -> None:
    (tmp_path / "file").touch()
    server = f"http://me:{SECRET}@127.0.0.1:{free_port()}"
    env = {
        **alone, "STOKER_SINKS": "mlflow", "MLFLOW_TRACKING_URI": server, "WANDB_API_KEY": SECRET,
        "GLOO_SOCKET_IFNAME": "nowhere0",
    }  # fmt: skip
    done = stoker("doctor", "--runs", "file/runs", "--json", env=env)
    assert done.code == 1
    assert len(done.out.splitlines()) == 1
    assert SECRET not in done.out + done.err
    found = {row["area"]: row["text"] for row in done.answer["findings"] if row["state"] == "problem"}
    assert "nowhere0" in found["ranks"]
    assert "set GLOO_SOCKET_IFNAME to an interface of this machine" in found["ranks"]
    assert "set --runs, or STOKER_RUNS, to a writable folder" in found["runs"]
    assert "start the server, or correct MLFLOW_TRACKING_URI" in found["trackers"]
    assert done.answer["problems"] >= len(found)
    assert _left(tmp_path, alone) == [tmp_path / "file"]


def test_interrupted_while_ranks_meet_it_leaves_nothing(
    start: Start, tmp_path: Path, alone: dict[str, str]
) -> None:
    process = start("doctor", env=alone)
    until(lambda: list(Path(alone["TMPDIR"]).glob("sd-*/stoker-launch-*")), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LONG)
    assert process.returncode == 130
    assert not _left(tmp_path, alone)
