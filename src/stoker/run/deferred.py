"""Metrics that were logged but may not be readable yet: tensors on an accelerator.

A tensor on a GPU is copied to pinned memory in the background, with an event behind the
copy, so that logging it never waits for the device. No torch is imported for anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Deferred:
    """Metric values as they were when this was made."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError for what is no number and no tensor of one element."""
        self._values = {key: _to_host(value) for key, value in values.items()}
        self._event = _recorded_event(values)

    @property
    def arrived(self) -> bool:
        """Whether the values can be read without waiting."""
        return self._event is None or bool(self._event.query())

    def read(self) -> dict[str, float]:
        """The values, waiting for the device where it must."""
        if self._event is not None:
            self._event.synchronize()
        return {key: float(value) for key, value in self._values.items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, names joined by "/"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _on_accelerator(value: Any) -> bool:
    device = getattr(value, "device", None)
    return getattr(device, "type", "cpu") == "cuda"


def _to_host(value: Any) -> Any:
    """A number; for a tensor on a GPU, a copy under way to pinned memory."""
    if not _on_accelerator(value):
        return float(value)
    import torch

    if value.numel() != 1:
        raise ValueError(f"a metric is one number; this tensor has the shape {tuple(value.shape)}")
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value.detach(), non_blocking=True)


def _recorded_event(values: Mapping[str, Any]) -> Any:
    """A CUDA event behind the copies of `_to_host`, or None where nothing is on a GPU."""
    devices = {value.device for value in values.values() if _on_accelerator(value)}
    if not devices:
        return None
    import torch

    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(devices.pop()))
    return event
