"""Imported before transformers and peft, which import what else is installed.

torchao and bitsandbytes speak up about kernels of machines that this is not; DeepSpeed looks for an
accelerator, and says what it found.
"""

import logging
import os

for _name in ("torchao", "torch.utils._pytree", "bitsandbytes", "DeepSpeed"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def before_deepspeed() -> None:
    """Tell DeepSpeed, before anything imports it, that there is no accelerator, where there is none."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
