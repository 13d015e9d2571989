"""The same bits each time, on GPUs: atomic additions come in any order there, and cuBLAS has workspaces."""

from __future__ import annotations

import os

import torch


def require() -> None:
    """Use only deterministic operations on GPUs in this process from now on; on CPUs nothing changes.

    An operation that has no such form raises a RuntimeError that names it.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
