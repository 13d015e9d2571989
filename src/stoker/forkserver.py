"""multiprocessing's forkserver, from which ranks, trials and a loader's workers are forked.

It imports modules in advance, which they then share.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import signal
import sys
from collections.abc import Sequence

from stoker import machine
from stoker.signals import ENDED_BY

_CLEANED = "ignore:resource_tracker:UserWarning"  # about leaked semaphores of killed ranks, which it removes
_QUANTISERS = ("bitsandbytes", "torchao")
"""They initialise CUDA as they are imported; transformers' models and peft import them where they are."""
_WITH_THEM = {"stoker", "peft", "transformers"}
_WITHOUT_CUDA = {"datasets", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "tokenizers", "torch"}


def start(own: Sequence[str], others: Sequence[str] = ()) -> None:
    """Start it, unless it runs, with `ENDED_BY` blocked, also in the processes that it forks.

    Processes that only serve the training one must not die before it has saved its checkpoint; they end when
    it does. In this process the signals are only blocked in the meantime, not ignored, so none is lost.

    Args:
        own: modules that it imports in advance, which do not touch CUDA.
        others: modules that it imports before those, as far as they are `harmless`.
    """
    from multiprocessing import forkserver, resource_tracker  # late, since importing delays signal handlers

    multiprocessing.get_context("forkserver").set_forkserver_preload([*harmless(others), *own])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDED_BY)
    sys.warnoptions.append(_CLEANED)
    try:
        resource_tracker.ensure_running()  # unblocks SIGTERM when it is done
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDED_BY)
        try:
            forkserver.ensure_running()
        except ChildProcessError:  # this process was forked from the one whose server it is
            forkserver._forkserver._forkserver_pid = None  # type: ignore[attr-defined]
            forkserver.ensure_running()
    finally:
        sys.warnoptions.remove(_CLEANED)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def harmless(modules: Sequence[str]) -> list[str]:
    """The modules that it may import; on a machine with GPUs, those known not to touch CUDA.

    A process forked from one that has initialised CUDA, or has only looked for devices, cannot use it.
    """
    if not modules or not machine.visible_gpus():
        return list(modules)
    quantised = any(importlib.util.find_spec(name) is not None for name in _QUANTISERS)
    known = {*sys.stdlib_module_names, *_WITHOUT_CUDA, *(() if quantised else _WITH_THEM)}
    return [module for module in modules if module.partition(".")[0] in known]
