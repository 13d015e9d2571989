"""Silences optional libraries. Import this before transformers and peft, which import what else is installed.

torchao and bitsandbytes print warnings about kernels for other hardware; DeepSpeed probes for an
accelerator, and prints what it found.
"""

import logging
import os

for _name in ("torchao", "torch.utils._pytree", "bitsandbytes", "DeepSpeed"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def before_deepspeed() -> None:
    """If there is no accelerator, tell DeepSpeed so before anything imports it."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
