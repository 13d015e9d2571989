"""Several machines: network namespaces, joined by a cable that can be pulled."""

from __future__ import annotations

import re
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from stoker.checkpoint import manifest
from stoker.launch.rounds import SILENCE
from test_launch import RECIPE, SLOW, _ranks, _weights, slow_until

from commands import Command, Start
from support import LONG, loaded, points, until

A, B = "10.77.0.1", "10.77.0.2"
SHORT = (*SLOW, "steps=120")


class Machines:
    """Two machines, `a` and `b`, that share a disk."""

    def __init__(self, names: dict[str, str], start: Start, folder: Path) -> None:
        self._names, self._start, self._folder = names, start, folder
        for machine in names:
            self.said(machine).touch()

    def start(self, machine: str, *arguments: str, first: str = "") -> subprocess.Popen[bytes]:
        """`stoker ARGUMENTS` on a machine, after some Python; what it says goes to `MACHINE.err`."""
        there = _ON_MACHINE.format(name=self._names[machine], file=str(self.said(machine)))
        process: subprocess.Popen[bytes] = self._start(*arguments, first=there + first)
        return process

    def said(self, machine: str) -> Path:
        return self._folder / f"{machine}.err"

    def cable(self, state: str) -> None:
        subprocess.run(["ip", "-n", self._names["b"], "link", "set", "eth0", state], check=True)


_ON_MACHINE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.setns(os.open("/run/netns/{name}", os.O_RDONLY), 0x40000000):  # CLONE_NEWNET
    raise OSError(ctypes.get_errno(), "setns")
os.dup2(os.open({file!r}, os.O_WRONLY | os.O_APPEND), 2)
"""
"""As `ip netns exec` does it."""


@pytest.fixture
def machines(start: Start, tmp_path: Path) -> Iterator[Machines]:
    mark = uuid.uuid4().hex[:6]
    names = {"a": f"stoker-a-{mark}", "b": f"stoker-b-{mark}"}
    try:
        for name in names.values():
            _ip("netns", "add", name)
        _ip(
            "-n",
            names["a"],
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            names["b"],
        )
        for name, address in zip(names.values(), (A, B), strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", name, "link", "set", link, "up")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no right to make network namespaces: {error}")
    yield Machines(names, start, tmp_path)
    for name in names.values():
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def test_a_machine_that_is_cut_off_is_noticed_and_all_go_on_to_the_same_bits(
    machines: Machines, stoker: Command, tmp_path: Path
) -> None:
    together = ("--nodes", "2", "--rendezvous", f"{A}:29511", "--max-restarts", "1", "--name", "a")
    go = tmp_path / "go"
    same = ("train", RECIPE, *SHORT, *slow_until(go, 25))
    run = tmp_path / "runs" / "ranked" / "a"
    processes = [machines.start(name, *same, *together) for name in ("a", "b")]
    until(lambda: points(run) > 25, *processes)
    machines.cable("down")
    until(lambda: "no message from" in machines.said("a").read_text(), *processes)
    until(lambda: "does not answer" in machines.said("b").read_text(), *processes)
    machines.cable("up")
    go.touch()
    assert [process.wait(LONG) for process in processes] == [0, 0], _all_said(machines)
    seen = loaded(run)
    assert [(attempt.world, attempt.status) for attempt in seen.attempts] == [
        (2, "preempted"),
        (2, "finished"),
    ]
    assert "does not respond" in (seen.attempts[0].error or "")
    assert list(seen.points["loss"].x) == list(range(1, 121))
    assert stoker(*same, "pause=0", "--nproc", "2", "--name", "whole").code == 0
    assert _weights(run) == _weights(tmp_path / "runs" / "ranked" / "whole")


@pytest.mark.soak(small=False)
def test_machines_that_are_suspended_together_go_on_where_they_are(
    machines: Machines, tmp_path: Path
) -> None:
    together = ("--nodes", "2", "--rendezvous", f"{A}:29511", "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    go = tmp_path / "go"
    same = ("train", RECIPE, *SLOW, *slow_until(go, 50))
    processes = [machines.start(name, *same, *together) for name in ("a", "b")]
    until(lambda: points(run) > 50, *processes)
    launchers = [psutil.Process(process.pid) for process in processes]
    everything = [one for launcher in launchers for one in (launcher, *launcher.children(recursive=True))]
    for one in everything:
        one.suspend()
    time.sleep(2 * SILENCE)
    for one in everything:
        one.resume()
    go.touch()
    assert [process.wait(LONG) for process in processes] == [0, 0], _all_said(machines)
    assert [attempt.world for attempt in loaded(run).attempts] == [2]


@pytest.mark.soak(small=False)
def test_a_rank_that_is_killed_on_one_machine_costs_all_a_restart(machines: Machines, tmp_path: Path) -> None:
    together = ("--nodes", "2", "--nproc", "2", "--rendezvous", f"{A}:29511", "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    go = tmp_path / "go"
    same = ("train", RECIPE, *SHORT, *slow_until(go, 25))
    processes = [machines.start(name, *same, *together, "--max-restarts", "1") for name in ("b", "a")]
    until(lambda: points(run) > 25, *processes)
    _ranks(processes[0])[1].kill()
    go.touch()
    assert [process.wait(LONG) for process in processes] == [0, 0], _all_said(machines)
    assert "was killed by SIGKILL" in machines.said("a").read_text()
    assert [(attempt.world, attempt.machines) for attempt in loaded(run).attempts] == [(4, 2)] * 2
    newest, _ = manifest.newest(run / "checkpoints")
    assert newest is not None
    assert newest.step == 120


@pytest.mark.soak(small=False)
def test_a_machine_that_is_lost_with_no_restart_left_ends_the_others_as_a_preemption(
    machines: Machines, tmp_path: Path
) -> None:
    """So a cluster's queue starts them again."""
    together = ("--nodes", "2", "--rendezvous", f"{A}:29511", "--name", "a")
    same = ("train", RECIPE, *SLOW, *slow_until(tmp_path / "never", 20))
    run = tmp_path / "runs" / "ranked" / "a"
    stays, lost = [machines.start(name, *same, *together) for name in ("a", "b")]
    until(lambda: points(run) > 20, stays, lost)
    lost.kill()
    assert stays.wait(LONG) == 75, _all_said(machines)
    said = machines.said("a").read_text()
    assert "does not respond, so all machines have ended" in said
    assert "Traceback" not in said, "of what the loss of the machine did to a rank"
    seen = loaded(run)
    assert seen.status == "preempted"
    assert "does not respond, so all machines have ended" in (seen.attempts[-1].error or "")


def test_what_fails_on_one_machine_ends_all_of_them_with_its_traceback(
    machines: Machines, tmp_path: Path
) -> None:
    together = ("--nodes", "2", "--rendezvous", f"{A}:29511", "--name", "a", "--max-restarts", "3")
    processes = [machines.start(name, "train", RECIPE, "fail_rank=1", *together) for name in ("a", "b")]
    assert [process.wait(LONG) for process in processes] == [1, 1]
    for name in ("a", "b"):
        said = machines.said(name).read_text()
        last = said[said.index("it fails at step 20 every time") :]
        assert last.count("RuntimeError: what one rank cannot do") == 2


def test_machines_that_share_no_folder_are_told(machines: Machines, tmp_path: Path) -> None:
    together = ("--nodes", "2", "--rendezvous", f"{A}:29511", "--name", "a")
    processes = [
        machines.start(name, "train", RECIPE, *SLOW, *together, "--runs", f"runs-{name}")
        for name in ("a", "b")
    ]
    # The one that comes second is told; where that is the one where they meet, the other loses it.
    until(lambda: any(process.poll() == 2 for process in processes))
    told = next(n for n, process in enumerate(processes) if process.poll() == 2)
    assert "is not the one that the other machines use" in machines.said("ab"[told]).read_text()


def test_a_machine_that_is_given_another_command_is_told(machines: Machines, tmp_path: Path) -> None:
    together = ("--nodes", "2", "--rendezvous", f"{A}:29511", "--name", "a")
    a = machines.start("a", "train", RECIPE, *SLOW, *together)
    until(lambda: "1 of 2" in machines.said("a").read_text(), a)
    b = machines.start("b", "train", RECIPE, *SLOW, "steps=90", *together)
    assert b.wait(LONG) == 2, _all_said(machines)
    said = machines.said("b").read_text()
    assert re.search(
        r"error: steps=90 on \S+, steps=200 on \S+: give the same command on every machine", said
    )
    assert "was refused: steps=90 on" in machines.said("a").read_text()
    a.terminate()
    assert a.wait(LONG) == 75
    assert not (tmp_path / "runs" / "ranked" / "a").exists()


def test_machines_whose_code_differs_end_before_they_train(machines: Machines, tmp_path: Path) -> None:
    """In what the script imports, which only ranks compare: all end at once, whatever restarts are left."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "helping.py").write_text(f"NAME = {name!r}\n")
        script = Path(RECIPE).read_text().replace("import stoker\n", "import helping\nimport stoker\n", 1)
        (tmp_path / name / "ranked.py").write_text(script)
    together = ("--nodes", "2", "--rendezvous", f"{A}:29511", "--name", "a", "--max-restarts", "3")
    processes = [machines.start(name, "train", f"{name}/ranked.py", *SLOW, *together) for name in "ab"]
    assert [process.wait(LONG) for process in processes] == [2, 2], _all_said(machines)
    for name in "ab":
        said = machines.said(name).read_text()
        assert "helping.py; every machine needs the same version of it" in said
        assert "starting again" not in said


def test_a_machine_told_to_stop_stops_all_after_a_checkpoint(machines: Machines, tmp_path: Path) -> None:
    together = ("--nodes", "2", "--rendezvous", f"{A}:29511", "--name", "a", "--max-restarts", "3")
    run = tmp_path / "runs" / "ranked" / "a"
    same = ("train", RECIPE, *SLOW, *slow_until(tmp_path / "never", 20))
    processes = [machines.start(name, *same, *together) for name in ("a", "b")]
    until(lambda: points(run) > 20, *processes)
    processes[1].terminate()
    assert [process.wait(LONG) for process in processes] == [75, 75], _all_said(machines)
    assert loaded(run).status == "preempted"


@pytest.mark.parametrize(("leaves", "stays"), ["ab", "ba"])
def test_a_machine_told_to_stop_while_ranks_come_up_ends_the_others_as_a_preemption(
    leaves: str, stays: str, machines: Machines, tmp_path: Path
) -> None:
    """So a cluster's queue starts them again; it may be the machine at which they meet."""
    together = ("--nodes", "2", "--rendezvous", f"{A}:29511", "--name", "a")
    late = ("train", RECIPE, *SLOW, "late=600")
    processes = {name: machines.start(name, *late, *together) for name in "ab"}
    until(lambda: _ranks(processes[leaves]), *processes.values())
    processes[leaves].terminate()
    assert [process.wait(LONG) for process in processes.values()] == [75, 75], _all_said(machines)
    assert "was told to stop, so all machines have ended" in machines.said(stays).read_text()
    assert points(tmp_path / "runs" / "ranked" / "a") == 0


def test_machines_come_and_go_and_the_batches_stay_the_same(
    machines: Machines, stoker: Command, tmp_path: Path
) -> None:
    """`a` begins alone; `b` comes, is told to stop, comes again, and is cut off: no restart is spent."""
    go = tmp_path / "go"
    same = ("train", RECIPE, *SLOW, "dropout=0", *slow_until(go, 5, pause=0.25))
    together = ("--nodes", "1:2", "--rendezvous", f"{A}:29511", "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    stays = machines.start("a", *same, *together)
    until(lambda: points(run) > 10, stays)
    comes = machines.start("b", *same, *together)
    until(lambda: _worlds(run) == [1, 2], stays, comes)
    before = points(run)
    until(lambda: points(run) > before + 5, stays, comes)
    comes.terminate()
    assert comes.wait(LONG) == 75, _all_said(machines)
    until(lambda: _worlds(run) == [1, 2, 1], stays)
    comes = machines.start("b", *same, *together)
    until(lambda: _worlds(run) == [1, 2, 1, 2], stays, comes)
    before = points(run)
    until(lambda: points(run) > before + 5, stays, comes)
    machines.cable("down")
    go.touch()
    assert stays.wait(LONG) == 0, _all_said(machines)
    seen = loaded(run)
    assert _worlds(run) == [attempt.machines for attempt in seen.attempts] == [1, 2, 1, 2, 1]
    assert [attempt.status for attempt in seen.attempts] == [*["preempted"] * 4, "finished"]
    assert "does not respond" in (seen.attempts[3].error or "")
    assert list(seen.points["loss"].x) == list(range(1, 201))
    assert stoker(*same, "pause=0", "--name", "whole").code == 0
    whole = loaded(tmp_path / "runs" / "ranked" / "whole")
    assert list(seen.points["loss"].y) == pytest.approx(list(whole.points["loss"].y), rel=1e-3)


@pytest.mark.soak(small=False)
def test_a_run_whose_machines_change_is_said_to_have_stopped_only_when_it_has(
    machines: Machines, tmp_path: Path
) -> None:
    together = ("--nodes", "1:2", "--rendezvous", f"{A}:29511", "--name", "a")
    run = tmp_path / "runs" / "ranked" / "a"
    same = ("train", RECIPE, *SLOW, *slow_until(tmp_path / "never", 5, pause=0.25))
    stays = machines.start("a", *same, *together)
    until(lambda: points(run) > 5, stays)
    comes = machines.start("b", *same, *together)
    until(lambda: _worlds(run) == [1, 2], stays, comes)
    before = points(run)
    until(lambda: points(run) > before + 5, stays, comes)
    stays.terminate()
    assert [process.wait(LONG) for process in (stays, comes)] == [75, 75], _all_said(machines)
    step = loaded(run).step
    said = [process.communicate()[0].decode() for process in (stays, comes)]
    assert [one.count("preempted at step") for one in said] == [1, 0], said
    assert f"ranked/a preempted at step {step}" in said[0]
    assert said[0].count("stoker resume a") == 1


def test_a_machine_more_than_can_share_the_work_waits(machines: Machines, tmp_path: Path) -> None:
    given = ("--nodes", "1:2", "--rendezvous", f"{A}:29511", "--name", "a", "batch_size=15", "steps=40")
    patient = "from stoker.launch import rounds; rounds.LAST_CALL = 240.0"  # it begins once both are there
    stays, spare = [
        machines.start(name, "train", RECIPE, *SLOW, *given, first=patient) for name in ("a", "b")
    ]
    assert [process.wait(LONG) for process in (stays, spare)] == [0, 0], _all_said(machines)
    assert "--nodes 1:2: only 1 can share the work evenly" in machines.said("a").read_text()
    assert _worlds(tmp_path / "runs" / "ranked" / "a") == [1]


def _worlds(run: Path) -> list[int]:
    """Ranks of each attempt so far."""
    return [attempt.world for attempt in loaded(run).attempts] if (run / "run.json").exists() else []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", "2", "--name", "a"), "--nodes needs --rendezvous HOST:PORT"),
        (("--nodes", "2", "--rendezvous", f"{A}:29511"), "--nodes needs --name"),
        (("--nodes", "2", "--rendezvous", A, "--name", "a"), "give the HOST:PORT"),
        (("--rendezvous", f"{A}:29511"), "give their number with --nodes"),
        (
            ("--nodes", "2:3", "batch_size=1", "--rendezvous", f"{A}:29511", "--name", "a"),
            "cannot be divided evenly among 3 data-parallel ranks",
        ),
        (("--nodes", "4:1"), "such as 2, or a minimum and maximum, such as 1:4"),
        (("--nodes", "2", "--rendezvous", "no.such.host.:1", "--name", "a"), "cannot resolve"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], said: str, stoker: Command) -> None:
    done = stoker("train", RECIPE, *arguments)
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("data=nowhere.jsonl", "batch_size=8"), "nowhere.jsonl does not exist"),
        (("lora.adapter=./nowhere", "batch_size=8"), "lora.adapter ./nowhere is not a directory"),
        (("batch_size=1", "max_steps=1"), "cannot be divided evenly among 3 data-parallel ranks"),
    ],
)
def test_what_no_number_of_machines_could_do_is_not_taken_for_one_too_many(
    given: tuple[str, ...], said: str, stoker: Command
) -> None:
    nodes = ("--nodes", "2:3", "--rendezvous", f"{A}:29511", "--name", "a")
    done = stoker("train", "llm", *given, *nodes)
    assert done.code == 2
    assert said in done.err


def test_what_is_looked_up_before_a_launch_is_looked_up_once_for_all_numbers_of_machines(
    stoker: Command, tmp_path: Path
) -> None:
    recipe = tmp_path / "own.py"
    recipe.write_text(_LOOKS_UP)
    done = stoker("train", str(recipe), "--nodes", "1:4", "--rendezvous", "no.such.host.:1", "--name", "a")
    assert (done.code, "cannot resolve" in done.err) == (2, True), done.err
    assert (tmp_path / "looked-up").read_text() == "once\n"


_LOOKS_UP = """
from pathlib import Path

import stoker


def check_launch(config):
    with (Path(__file__).parent / "looked-up").open("a") as file:
        file.write("once\\n")


def train(run, config: stoker.Training):
    pass
"""


def _all_said(machines: Machines) -> str:
    return "\n".join(f"{name}: {machines.said(name).read_text()}" for name in ("a", "b"))
