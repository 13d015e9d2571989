"""Imported before transformers: torchao, which that imports where it is installed, speaks up about
kernels of machines that this is not."""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
