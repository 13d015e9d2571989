"""Whether two files contain the same weights, bit by bit.

The bytes of two safetensors files with the same tensors can differ if other programs, or other versions,
wrote them: the metadata in the header can be in any order (https://huggingface.co/docs/safetensors#format).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PIECE = 2**20  # bytes compared at once


def same(one: Path, other: Path) -> bool:
    """Whether the tensors of two safetensors files are the same. Raises OSError if one cannot be read."""
    with one.open("rb") as first, other.open("rb") as second:
        if _tensors(first) != _tensors(second):
            return False
        while piece := first.read(_PIECE):
            if piece != second.read(len(piece)):
                return False
        return not second.read(1)


def _tensors(file: Any) -> dict[str, Any]:
    """The header's types, shapes and positions of the tensors. Leaves the file positioned at their bytes."""
    length = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header
