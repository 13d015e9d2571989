"""Metrics that were logged but may not be readable yet: tensors on an accelerator.

A tensor on a GPU is copied to pinned memory in the background, with a CUDA event after the copies from each
device, so that logging never waits for a device. torch is imported only for tensors on a GPU and for
`DeferredArrays`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_LONGEST_NAME = 250  # bytes, accepted by every sink


class Deferred:
    """Metric values as they were when this object was created."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError for a value that is neither a number nor a one-element tensor."""
        self._on_device: dict[str, Any] = {}
        self._values = {
            key: value if type(value) is float else self._read(key, value) for key, value in values.items()
        }
        self._events = _recorded_events(self._on_device)

    @property
    def arrived(self) -> bool:
        """Whether the values can be read without waiting."""
        return all(event.query() for event in self._events)

    def read(self) -> dict[str, float]:
        """The values, waiting for the device if necessary."""
        for event in self._events:
            event.synchronize()
        self._events.clear()  # only now: if one failed, a later call fails too, and reads no unfinished copy
        while self._on_device:
            key, _ = self._on_device.popitem()
            self._values[key] = float(self._values[key])
        return self._values

    def _read(self, key: str, value: Any) -> Any:
        """A number; for a tensor on a GPU, its copy in pinned memory, possibly still in progress."""
        if isinstance(value, str | bytes):
            raise TypeError(f"{key}={value!r}: a metric must be a number or a tensor of one element")
        if _is_complex(value):
            raise TypeError(f"{key} is complex: a metric is a real number, such as its abs()")
        if getattr(getattr(value, "device", None), "type", "cpu") != "cuda":
            return _number(key, value)
        import torch

        if value.numel() != 1:
            raise _of_many(key, value.shape)
        self._on_device[key] = value
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value.detach(), non_blocking=True)


class DeferredArrays:
    """Tensors of any shape as they were when this object was created, readable as NumPy arrays."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        import torch

        self._tensors: dict[str, Any] = {}
        for name, tensor in tensors.items():
            on_device = tensor.is_cuda
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
            self._tensors[name] = host.copy_(tensor.detach(), non_blocking=on_device)
        on_device = {name: tensor for name, tensor in tensors.items() if tensor.is_cuda}
        self._events = _recorded_events(on_device)

    @property
    def arrived(self) -> bool:
        """Whether the arrays can be read without waiting."""
        return all(event.query() for event in self._events)

    def read(self) -> dict[str, Any]:
        """The arrays, waiting for the device if necessary."""
        for event in self._events:
            event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts, joining names with "/"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_name(name: str) -> None:
    """Check the name of a metric. Raises ValueError."""
    if not name or not name.isprintable():
        raise ValueError(f"{name!r} is not a valid metric name: it is empty or has control characters")
    if len(name.encode(errors="replace")) > _LONGEST_NAME:
        length = len(name.encode(errors="replace"))
        raise ValueError(f"the metric name {name[:40]!r}... has {length} bytes: the limit is {_LONGEST_NAME}")


def _is_complex(value: Any) -> bool:
    """Whether a number, array or tensor is complex; float() would drop the imaginary part of some."""
    kind = getattr(value, "dtype", None)
    return isinstance(value, complex) or getattr(kind, "is_complex", getattr(kind, "kind", "") == "c")


def _number(key: str, value: Any) -> float:
    if getattr(value, "requires_grad", False):
        value = value.detach()  # torch warns about float() of a tensor with gradients
    shape = getattr(value, "shape", ())
    if len(shape) and math.prod(shape) == 1 and hasattr(value, "reshape"):
        value = value.reshape(())  # NumPy reads no array with dimensions as a number
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        if len(shape) and math.prod(shape) != 1:
            raise _of_many(key, shape) from None
        found = f"{key} is of type {type(value).__name__}"
        raise TypeError(f"{found}: a metric must be a number or a tensor of one element") from None


def _of_many(key: str, shape: Any) -> ValueError:
    return ValueError(
        f"{key} has the shape {tuple(shape)}, but a metric is one number: log its mean, or all of it with "
        f"run.histogram({key!r}, ...)"
    )


def _recorded_events(values: Mapping[str, Any]) -> list[Any]:
    """CUDA events recorded after the copies of tensors that are on GPUs, one for each GPU."""
    if not values:
        return []
    import torch

    events = []
    for device in {tensor.device for tensor in values.values()}:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return events
