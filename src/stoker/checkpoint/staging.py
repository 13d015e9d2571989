"""Host memory that the state is copied to, so that training continues while it is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class HostBuffers:
    """Memory by name, allocated once and used for every checkpoint; pinned if there is a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Contiguous copies of the tensors; they are valid until the next call."""
        self._buffers = {name: self._room(name, tensor) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        return dict(self._buffers)

    def _room(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        held = self._buffers.get(name)
        if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
            return held
        pinned = tensor.device.type == "cuda"
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
