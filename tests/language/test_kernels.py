"""Fused kernels, as far as they can be seen without a GPU: what is refused."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from stoker import BadInput
from stoker.language import kernels

import families


def test_they_are_refused_where_they_cannot_run() -> None:
    model = families.model("llama")
    forward = model.model.norm.forward
    kernels.use(model, "torch")
    assert model.model.norm.forward == forward
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        pytest.skip("here they can run")
    with pytest.raises(BadInput, match=r"this machine has none|pip install 'stoker\[liger\]'"):
        kernels.use(model, "liger")
