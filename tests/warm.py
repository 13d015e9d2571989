"""One forkserver for all tests that start processes, which has imported already what they use.

A process has a single forkserver, with the modules and the environment of whoever asks for it
first: so it is asked for before the first test. Commands are forked from it too, and so is the server that
a command starts itself (see `Spare`): as processes like any other, but for the seconds that imports take.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, reduction, util
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from stoker.cli import main
from stoker.tracking import store

CONTEXT = multiprocessing.get_context("forkserver")
_MODULES = [
    "pytest",
    "torch",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "stoker.trainer",
    *(f"stoker.cli.verbs.{name}" for name in main.COMMANDS),
    "peft",
    "stoker.tracking.mlflow_sink",
    "mlflow.store.tracking.sqlalchemy_store",
    "s3fs",
    "stoker.engine.pipeline",
    "stoker.cli.searching",
    "setuptools",
    "plotly.offline",
    "synthetic_run",
    "ranks",
    "stoker.preloaded",  # last: what is imported by then is no garbage
]


_begun_with: dict[str, str] = {}


def fits(environment: Mapping[str, str]) -> bool:
    """Whether a command in an environment would import as the server has."""
    return _beginning(environment, "PYTHON") == _beginning(_begun_with, "PYTHON")


def _beginning(environment: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The variables with a prefix, which are looked at on import; a test's Ray sets one that is not."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(prefix) and name != "PYTHONBREAKPOINT"
    }


def _take_hub_of(environment: Mapping[str, str]) -> None:
    """Have this process use the hub that its environment names: its client read that when it was imported."""
    if _beginning(environment, "HF_") != _beginning(_begun_with, "HF_"):
        from huggingface_hub import constants

        importlib.reload(constants)


def start() -> None:
    """Start it; it imports while the tests begin."""
    # A shell ignores SIGINT for what it runs in the background, and so would the processes started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # likewise `nohup`; a handler is not inherited
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    os.environ.update(
        store.QUIET, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", STOKER_SINKS="none", HF_HUB_OFFLINE="1"
    )
    _begun_with.update(os.environ)
    CONTEXT.set_forkserver_preload(_MODULES)
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):  # what is imported has much to say
        os.dup2(nowhere, number)
    try:
        forkserver.ensure_running()
    finally:
        for number, file in enumerate(kept, start=1):
            os.dup2(file, number)
            os.close(file)
        os.close(nowhere)


def process(target: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """A process, not yet started, with this one's environment and output as they are now."""
    return CONTEXT.Process(target=_with, args=(_Output(), dict(os.environ), target, arguments))


class Command:
    """`stoker ARGUMENTS` as a process, with the methods of a Popen that has pipes for its output.

    Args:
        first: Python that it executes before.
    """

    def __init__(
        self, arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path, first: str = ""
    ) -> None:
        self.args = list(arguments)
        pipes = [os.pipe() for _ in range(2)]
        output = _Output(*(writing for _, writing in pipes))
        self._process = CONTEXT.Process(
            target=_command, args=(output, dict(environment), folder, self.args, first)
        )
        self._process.start()
        self._said: list[bytes] = [b"", b""]
        self._readers = []
        for number, (reading, writing) in enumerate(pipes):
            os.close(writing)
            reader = threading.Thread(target=self._read, args=(number, reading), daemon=True)
            reader.start()
            self._readers.append(reader)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def err(self) -> bytes:
        """What it has said to standard error so far."""
        return self._said[1]

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # reaped, which the server has not said yet
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Its output, once nobody can write to it any more, and it has ended."""
        self.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._said[0], self._said[1]

    def _read(self, number: int, reading: int) -> None:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while part := pipe.read(2**16):
                self._said[number] += part


class Spare:
    """A process that becomes the server of processes which its parent starts, where it starts one.

    It is forked before its parent does anything, and has imported what such a server would import. It is the
    parent's child, has its environment, folder, output and signal mask of the time, and no file of it
    but those that it is given: as if the parent had executed a new Python.
    """

    def __init__(self) -> None:
        self._execute = util.spawnv_passfds
        self._ours: socket.socket | None
        self._ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            _become(theirs)
        theirs.close()

    def spawn(self, path: bytes, arguments: Sequence[Any], files: Sequence[int]) -> int:
        """In place of multiprocessing's own function; the second time, and for another process, as that."""
        if self._ours is None or "multiprocessing.forkserver" not in str(arguments[-1]):
            return self._execute(path, arguments, files)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        asked = (arguments[-1], dict(os.environ), str(Path.cwd()), mask, list(files))
        try:
            with self._ours as ours:
                socket.send_fds(ours, [pickle.dumps(asked)], list(files))
        except OSError:  # somebody has killed it
            return self._execute(path, arguments, files)
        finally:
            self._ours = None
        return self._pid


def _become(theirs: socket.socket) -> None:
    """Wait for what to become, and be that until the end; end where nothing comes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _close_all_but(theirs.fileno())
    asked, files, _, _ = socket.recv_fds(theirs, 2**20, 16)
    if not asked:
        os._exit(0)
    theirs.detach()  # what it had is closed below
    code, environment, folder, mask, wanted = pickle.loads(asked)
    above = 1 + max([*files, *wanted])
    kept = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]  # out of the way of the numbers wanted
    for file, number in zip(kept, wanted, strict=True):
        os.dup2(file, number)
    _close_all_but(*wanted)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        os._exit(0)


def _close_all_but(*files: int) -> None:
    for name in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if name > 2 and name not in files:
            with contextlib.suppress(OSError):
                os.close(name)


def _command(
    output: None, environment: dict[str, str], folder: Path, arguments: list[str], first: str
) -> None:
    """What `python -m stoker` does."""
    from stoker import __main__

    os.setpgid(0, 0)  # of its own, so that a test can signal all of it
    atexit.unregister(weakref.finalize._exitfunc)  # torch's libraries are freed with the process
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None  # as its environment says
    _take_hub_of(environment)
    exec(first, {})
    util.spawnv_passfds = Spare().spawn
    sys.argv = [str(__main__.__file__), *arguments]
    try:
        __main__.run()
    finally:
        atexit._run_exitfuncs()


class _Output:
    """Two files, by default standard output and error; becomes those of the process that is started."""

    def __init__(self, *files: int) -> None:
        self._files = files or (1, 2)

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, tuple(map(reduction.DupFd, self._files))


def _take(*files: Any) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(file.detach(), number)


def _with(
    output: None, environment: dict[str, str], target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)
