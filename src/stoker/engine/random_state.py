"""The random state of a process: Python's, NumPy's, and torch's on CPU and GPU.

It is seeded at the start, saved with every checkpoint, and restored last, so that nothing between
restoring and the next step can draw from it. A process that has not loaded torch is seeded without
it, so torch is imported only where it is used.
"""

from __future__ import annotations

import base64
import random
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and, if loaded, torch (every device) with one number."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if "torch" not in sys.modules:
        return
    import torch

    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same, but does not prepare for later devices: saves half a millisecond per trial
        torch.default_generator.manual_seed(seed)


def of_rank(seed: int, rank: int, step: int) -> int:
    """A seed for a rank that starts at a step without a saved random state."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def capture() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state as tensors (uint8) and JSON values."""
    import torch

    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    values = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    return tensors, values


def written() -> dict[str, Any]:
    """The same state as JSON values alone."""
    tensors, values = capture()
    texts = {name: base64.b64encode(t.numpy().tobytes()).decode() for name, t in tensors.items()}
    return {**values, "torch": texts}


def restore_written(values: dict[str, Any]) -> None:
    """Restore what `written` returned."""
    import torch

    tensors = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in values["torch"].items()
    }
    restore(tensors, values)


def restore(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Restore what `capture` returned."""
    import torch

    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
