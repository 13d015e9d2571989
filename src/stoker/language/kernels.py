"""Replaces parts of a model with liger-kernel's fused kernels (Hsu et al. 2024, arXiv:2410.10989), on GPUs.

Norms, rotary embeddings and feed-forward layers are replaced; the loss stays ours (`cross_entropy`), and so
does attention. The kernels' results are the same up to rounding.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from stoker.errors import BadInput
from stoker.language.lora import without_adapters

Kernels = Literal["torch", "liger"]


def check(kernels: Kernels) -> None:
    """Raises BadInput if there is no GPU to run them, or liger-kernel is not installed."""
    if kernels == "torch":
        return
    if not torch.cuda.is_available():
        raise BadInput("kernels=liger needs a GPU, and this machine has none: omit it")
    if importlib.util.find_spec("liger_kernel") is None:
        raise BadInput("kernels=liger needs liger-kernel: pip install 'stoker[liger]'")


def use(model: Any, kernels: Kernels) -> None:
    """Make a transformers causal model, with or without adapters, use the kernels. Raises BadInput.

    The model can be on the meta device, but cannot be called there any more: the kernels run only on GPUs.
    """
    check(kernels)
    if kernels == "torch":
        return
    from liger_kernel.transformers import monkey_patch

    bare = without_adapters(model)
    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if bare.config.model_type not in known:
        raise BadInput(
            f"kernels=liger does not support a {bare.config.model_type}; it supports "
            f"{', '.join(sorted(known))}"
        )
    monkey_patch._apply_liger_kernel_to_instance(bare, cross_entropy=False, fused_linear_cross_entropy=False)
