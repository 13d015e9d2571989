"""Work in threads, and the end of a process that has such."""

from __future__ import annotations

import _io
import atexit
import concurrent.futures
import contextlib
import ctypes
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, TypeVar

from stoker import signals

T = TypeVar("T")


def begun(work: Callable[[], T], name: str) -> concurrent.futures.Future[T]:
    """Run `work` in a daemon thread, which, unlike an executor's, does not keep the process from ending."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def at_end_of_script(call: Callable[[], None]) -> None:
    """Call a method when the main thread has ended, unless its object is gone by then.

    Threads can still be started there, which functions of `atexit` cannot do.
    """
    method = weakref.WeakMethod(call)

    def call_if_there() -> None:
        found = method()
        if found is not None:
            found()

    threading._register_atexit(call_if_there)  # type: ignore[attr-defined]


def end_process(code: int) -> NoReturn:
    """End the process as `sys.exit(code)` does, but with daemon threads without tearing the interpreter down.

    If a daemon thread, ours or a user's, is inside torch when the interpreter is torn down, the process
    aborts ("terminate called without an active exception"): the thread is ended while pybind11 takes the GIL
    in a destructor. A training that is complete would then have the exit code of a crash. As in processes of
    multiprocessing, other threads are waited for, exit functions are called, and files are flushed.

    A profiler around the script gets to write what it saw, a debugger to ask again: there it is `sys.exit`.
    Otherwise signals no longer change the exit code, see `signals.keep`.
    """
    if _is_watched():
        sys.exit(code)
    signals.keep(code)
    if not any(thread.daemon for thread in threading.enumerate()):
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for opened in [o for o in gc.get_objects() if issubclass(type(o), _io._IOBase)]:
        with contextlib.suppress(Exception):  # closed, read only, or a pipe whose reader is gone
            opened.flush()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)  # what libraries print, as NCCL does
    os._exit(code)


def _is_watched() -> bool:
    """Whether the script runs within `python -m cProfile`, `-m trace`, `-m pdb` or `-i`."""
    monitoring = getattr(sys, "monitoring", None)  # by which cProfile looks on as of Python 3.12
    profiled = monitoring is not None and monitoring.get_tool(monitoring.PROFILER_ID) is not None
    return profiled or _is_debugged() or bool(sys.getprofile() or sys.gettrace() or sys.flags.inspect)


def _is_debugged() -> bool:
    """Whether a debugger has called the script. Without a breakpoint left, it does not trace."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "bdb":
        frame = frame.f_back
    return frame is not None
