"""The machine's resources while a run goes on, and warnings when one of them runs short."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)
_REARM = 0.05  # a warning may come again once the share has fallen this far below its threshold
INTERVAL = 5.0


@dataclass(frozen=True)
class ResourceReading:
    """Shares from 0 to 1, rates in bytes per second since the last sample; None where the system does not say.

    cpu is the share of all cores that anyone uses; disk that of the file system the run writes to; io is this
    process', network is the machine's.
    """

    memory: float | None
    cpu: float | None
    disk: float | None
    disk_free_bytes: int | None
    io_read: float | None
    io_written: float | None
    network_received: float | None
    network_sent: float | None
    gpu_utilization: float | None
    gpu_memory: float | None


class ResourceMonitor:
    """Samples resources and warns once each time one of them passes its threshold.

    Sampling happens inside of `check`, at most every `interval` seconds, and takes about a millisecond: no thread.

    Args:
        folder: where the run writes; its file system is watched.
        thresholds: share in use above which a warning is given, by "memory", "cpu", "disk", "gpu_memory"; None never.
        memory_share: memory in use as a share of the run's limit; by default the machine's memory in use.
    """

    def __init__(
        self, folder: Path, thresholds: Mapping[str, float | None], *,
        memory_share: Callable[[], float | None] | None = None, interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.folder, self.interval = folder, interval
        self.thresholds = {name: limit for name, limit in thresholds.items() if limit is not None}
        self._memory_share = memory_share or _host_memory_share
        self._clock, self._sampled_at = clock, float("-inf")
        self._warned: set[str] = set()
        self._gpu = _open_gpu()
        self._counters: tuple[float, _Counters] | None = None

    def check(self) -> list[dict[str, Any]]:
        """Warning events of thresholds passed since the last call; empty within `interval` of the last sample."""
        now = self._clock()
        if now - self._sampled_at < self.interval:
            return []
        self._sampled_at = now
        return self.warnings(self.sample())

    def warnings(self, reading: ResourceReading) -> list[dict[str, Any]]:
        """One event `{"event": "threshold", "resource": ..., "share": ..., "threshold": ...}` for each newly passed."""
        events = []
        for name, limit in self.thresholds.items():
            share = getattr(reading, name)
            if share is None or share <= limit:
                if share is not None and share < limit - _REARM:
                    self._warned.discard(name)
                continue
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("%s in use: %.0f %%, the threshold is %.0f %%", name, 100 * share, 100 * limit)
                events.append({"event": "threshold", "resource": name, "share": round(share, 4), "threshold": limit})
        return events

    def sample(self) -> ResourceReading:
        """Read everything now."""
        import psutil

        try:
            disk = psutil.disk_usage(str(self.folder))
        except OSError:
            disk = None
        rates = self._rates()
        return ResourceReading(
            memory=self._memory_share(),
            cpu=psutil.cpu_percent(None) / 100,
            disk=disk.percent / 100 if disk else None,
            disk_free_bytes=disk.free if disk else None,
            io_read=rates.io_read,
            io_written=rates.io_written,
            network_received=rates.network_received,
            network_sent=rates.network_sent,
            gpu_utilization=self.gpu_utilization(),
            gpu_memory=self._gpu.memory() if self._gpu else None,
        )

    def gpu_utilization(self) -> float | None:
        """Busy share of the first GPU, 0 to 1; None without one."""
        return self._gpu.utilization() if self._gpu else None

    def _rates(self) -> _Counters:
        now, counters = time.monotonic(), _read_counters()
        before, self._counters = self._counters, (now, counters)
        if before is None or now <= before[0]:
            return _Counters(None, None, None, None)
        return _Counters(*(
            None if new is None or old is None else max(0.0, (new - old) / (now - before[0]))
            for new, old in zip(counters, before[1], strict=True)
        ))  # fmt: skip


class _Counters(NamedTuple):
    io_read: float | None
    io_written: float | None
    network_received: float | None
    network_sent: float | None


def _read_counters() -> _Counters:
    """Bytes since the start of the process (io) and of the machine (network)."""
    import psutil

    try:
        io = psutil.Process().io_counters()
        moved: tuple[float | None, float | None] = io.read_bytes, io.write_bytes
    except (AttributeError, OSError, psutil.Error):  # macOS has none; some containers forbid it
        moved = None, None
    try:
        network = psutil.net_io_counters()
    except OSError:
        network = None
    return _Counters(*moved, network.bytes_recv if network else None, network.bytes_sent if network else None)


def _host_memory_share() -> float:
    import psutil

    host = psutil.virtual_memory()
    return 1 - host.available / host.total


class _Gpu:
    """The first NVIDIA GPU through NVML. Values that the driver does not give are None."""

    def __init__(self, nvml: Any) -> None:
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByIndex(0)

    def utilization(self) -> float | None:
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        return None if rates is None else rates.gpu / 100

    def memory(self) -> float | None:
        info = self._ask("nvmlDeviceGetMemoryInfo")
        return None if info is None else info.used / info.total

    def _ask(self, function: str) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle)
        except self._nvml.NVMLError:
            return None


def _open_gpu() -> _Gpu | None:
    """None without the package, the driver or a GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return _Gpu(pynvml)
    except pynvml.NVMLError:
        return None
