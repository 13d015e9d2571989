"""Machine metrics during training: CPU, memory, disk, network, NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil


class SystemSampler:
    """Samples the machine that this process runs on, and the disk that holds `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self._gpus = _gpus()
        self._before = self._counters()
        self._at = time.monotonic()
        psutil.cpu_percent()  # the first call starts the measurement
        self._process.cpu_percent()

    def sample(self) -> dict[str, float]:
        """Percentages, bytes, bytes per second, watts and degrees Celsius, as the names say."""
        memory = psutil.virtual_memory()
        found = {
            "cpu_percent": psutil.cpu_percent(),
            "process_cpu_percent": self._process.cpu_percent(),
            "memory_percent": memory.percent,
            "memory_used_bytes": memory.total - memory.available,
            "process_memory_bytes": self._process.memory_info().rss,
        }
        with contextlib.suppress(FileNotFoundError):  # the folder is gone, which whoever writes there reports
            disk = psutil.disk_usage(str(self._folder))
            found |= {"disk_used_percent": disk.percent, "disk_free_bytes": disk.free}
        counters, now = self._counters(), time.monotonic()
        seconds = max(now - self._at, 1e-3)
        for name, count in counters.items():
            found[f"{name}_bytes_per_second"] = (count - self._before.get(name, count)) / seconds
        self._before, self._at = counters, now
        for index, gpu in enumerate(self._gpus):
            found.update({f"gpu_{index}_{name}": value for name, value in _gpu_values(gpu)})
        return {name: float(value) for name, value in found.items()}

    def _counters(self) -> dict[str, int]:
        """Bytes since the machine started; a container may hide some of them."""
        disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
        found: dict[str, int] = {}
        if disk is not None:
            found.update(disk_read=disk.read_bytes, disk_write=disk.write_bytes)
        if network is not None:
            found.update(network_received=network.bytes_recv, network_sent=network.bytes_sent)
        return found


def _gpus() -> list[Any]:
    """A handle for each NVIDIA GPU; none if there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _gpu_values(gpu: Any) -> Iterator[tuple[str, float]]:
    """The values that this GPU supports."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        yield "utilization_percent", pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        yield "memory_used_bytes", memory.used
        yield "memory_percent", 100 * memory.used / memory.total
    with contextlib.suppress(pynvml.NVMLError):
        yield "power_watts", pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    with contextlib.suppress(pynvml.NVMLError):
        yield "temperature_celsius", pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)
