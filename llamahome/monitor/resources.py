"""The machine's resources while a run goes on, and a warning when one is nearly used up."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_REARM = 0.05  # a warning is given again once the share has fallen this far below its threshold


class ResourceMonitor:
    """Reads shares in use of memory, processors, disk and GPU memory; `thresholds` are shares, None never warns."""

    def __init__(self, folder: Path, thresholds: Mapping[str, float | None]) -> None:
        self.folder = folder
        self.thresholds = {name: limit for name, limit in thresholds.items() if limit is not None}
        self._above: set[str] = set()
        self._gpu = _open_gpu()
        psutil.cpu_percent(interval=None)  # the first call has nothing to compare with

    def read(self) -> dict[str, float | None]:
        """Shares from 0 to 1; None where there is no such thing on this machine."""
        disk = shutil.disk_usage(self.folder)
        utilization, gpu_memory = self._read_gpu()
        return {
            "memory": psutil.virtual_memory().percent / 100,
            "cpu": psutil.cpu_percent(interval=None) / 100,
            "disk": disk.used / disk.total,
            "gpu_memory": gpu_memory,
            "gpu": utilization,
        }

    def check(self) -> list[dict[str, Any]]:
        """One event for each resource that has just passed its threshold."""
        events = []
        shares = self.read() if self.thresholds else {}
        for name, limit in self.thresholds.items():
            share = shares[name]
            if share is None:
                continue
            if share > limit and name not in self._above:
                self._above.add(name)
                events.append({"event": "threshold", "resource": name, "share": round(share, 3), "threshold": limit})
            elif share < limit - _REARM:
                self._above.discard(name)
        return events

    def gpu_utilization(self) -> float | None:
        """Share of time that the GPU was busy, from 0 to 1."""
        return self._read_gpu()[0]

    def _read_gpu(self) -> tuple[float | None, float | None]:
        if self._gpu is None:
            return None, None
        import pynvml

        try:
            rates, memory = pynvml.nvmlDeviceGetUtilizationRates(self._gpu), pynvml.nvmlDeviceGetMemoryInfo(self._gpu)
        except pynvml.NVMLError:
            return None, None
        return rates.gpu / 100, memory.used / memory.total


def _open_gpu() -> Any:
    """The handle of the first GPU, or None without the library, a driver or a GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None
