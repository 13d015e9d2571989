"""The machine and the interpreter that a run used: `environment.json`."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker import machine, redaction
from stoker.reproduce import shipped
from stoker.reproduce.packages import Package

_RELEVANT = (
    "CUDA_", "CUBLAS_", "CUDNN_", "NCCL_", "GLOO_", "NVIDIA_", "TORCH", "PYTORCH_", "OMP_", "MKL_", "KMP_",
    "OPENBLAS_", "GOTO_", "BLIS_", "VECLIB_", "NUMEXPR_", "PYTHON", "HF_", "TRANSFORMERS_", "TOKENIZERS_",
    "DATASETS_", "STOKER_", "SLURM_", "XLA_", "TF_", "TRITON_", "HIP_", "ROCR_", "HSA_", "DNNL_", "ONEDNN_",
    "DS_", "DEEPSPEED_", "BITSANDBYTES_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "RAY_",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "MALLOC_", "LANG", "LC_", "TZ", "VIRTUAL_ENV", "CONDA_",
)  # fmt: skip


def describe(packages: Sequence[Package], variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The contents of `environment.json`.

    Nothing is imported for it: torch's details are read from the file in which its build records them.

    Args:
        variables: the environment; default: this process's.
    """
    hardware = machine.hardware()
    given = os.environ if variables is None else variables
    relevant = {
        name: given[name]
        for name in sorted(given)
        if name.startswith(_RELEVANT) and name not in (shipped.RECORD, shipped.FOLDER)
    }
    cudnn = [package.version for package in packages if package.name.startswith("nvidia-cudnn-")]
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        **hardware,
        **({"cudnn": cudnn[0]} if cudnn else {}),
        **({"torch": build} if (build := _torch()) else {}),
        "variables": redaction.variables(relevant),
    }


def _torch() -> dict[str, Any]:
    """The version of torch, its commit, and the CUDA and HIP versions that it was built for."""
    try:
        found = importlib.util.find_spec("torch")
        parsed = ast.parse(Path(found.origin).with_name("version.py").read_bytes())  # type: ignore[union-attr,arg-type]
    except (ImportError, AttributeError, TypeError, ValueError, OSError, SyntaxError):
        return {}
    said: dict[str, Any] = {}
    for line in parsed.body:
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        value = getattr(line, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            said[target.id] = value.value
    named = {"version": "__version__", "git": "git_version", "cuda": "cuda", "hip": "hip"}
    return {name: said[key] for name, key in named.items() if said.get(key) is not None}


def on_gpu(layout: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Whether a run computed on a GPU; without a recorded device, whether its machine had one."""
    gpus = [str(gpu).partition(",")[0] for gpu in recorded.get("gpus", ())]
    return layout["device"] in gpus if "device" in layout else bool(gpus)
