"""The shape of a new image classifier: one of the ResNets."""

from __future__ import annotations

from typing import Any

_DEEP = [256, 512, 1024, 2048]
_WIDE = [64, 128, 256, 512]

# Widths, depths and layer type as in He et al. 2016, table 1; the tiny one is for images of 32 pixels.
SIZES: dict[str, dict[str, Any]] = {
    "resnet-tiny": {
        "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic",
    },
    "resnet-18": {"hidden_sizes": _WIDE, "depths": [2, 2, 2, 2], "layer_type": "basic"},
    "resnet-34": {"hidden_sizes": _WIDE, "depths": [3, 4, 6, 3], "layer_type": "basic"},
    "resnet-50": {"hidden_sizes": _DEEP, "depths": [3, 4, 6, 3], "layer_type": "bottleneck"},
    "resnet-101": {"hidden_sizes": _DEEP, "depths": [3, 4, 23, 3], "layer_type": "bottleneck"},
}  # fmt: skip
