"""How much memory this process uses, and how much it may use."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.config.sizes import parse_size
from llamahome.errors import ConfigError, MemoryLimitError, MissingError
from llamahome.memory.cgroup import memory_groups, read_small

if TYPE_CHECKING:
    from llamahome.config import Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Memory of one device at one moment.

    used_bytes: what this process holds; on a CPU its resident set, mapped files included.
    peak_bytes: the highest `used_bytes` since the last `reset_peak`.
    total_bytes: all that the process could ever hold: the smallest of the device, control groups and RLIMIT_DATA.
    available_bytes: what the process could take now in addition, given what others hold.
    """

    used_bytes: int
    peak_bytes: int
    total_bytes: int
    available_bytes: int


class MemoryMonitor:
    """Reads the memory of `device` ("cpu", "cuda" or "cuda:N").

    `root` stands for `/`, where /proc and /sys are found. Raises: MissingError for a GPU that is not there.
    """

    def __init__(self, device: str = "cpu", root: Path = Path("/")) -> None:
        self.device, self.root = device, root
        self._status, self._meminfo = root / "proc/self/status", root / "proc/meminfo"
        self._has_proc = self._status.exists()
        self._groups = [group for group in memory_groups(root) if any(path.exists() for path in group.files)]
        self._highest = 0
        if self.device != "cpu":
            _require_cuda(device)

    def read(self) -> MemoryReading:
        """The state now; below 100 microseconds on a CPU."""
        if self.device != "cpu":
            return _read_cuda(self.device)
        reading = self._read_host() if self._has_proc else self._read_portable()
        total, available = reading.total_bytes, reading.available_bytes
        for limit, used in self._limits():
            total, available = min(total, limit), min(available, max(0, limit - used))
        return MemoryReading(reading.used_bytes, reading.peak_bytes, total, available)

    def reset_peak(self) -> bool:
        """Begin a new peak; False where the system cannot, and the peak goes on from the process' start."""
        if self.device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        self._highest = 0
        try:
            (self.root / "proc/self/clear_refs").write_text("5")
        except OSError:
            return not self._has_proc
        return True

    def _read_host(self) -> MemoryReading:
        status, meminfo = read_small(self._status), read_small(self._meminfo)
        used = _bytes_of(status, b"\nVmRSS:")
        peak = max(used, _bytes_of(status, b"\nVmHWM:"))
        total, available = _bytes_of(b"\n" + meminfo, b"\nMemTotal:"), _bytes_of(meminfo, b"\nMemAvailable:")
        limit = _data_limit()
        if limit is not None:
            total = min(total, limit)
            data, resident = _bytes_of(status, b"\nVmData:"), _bytes_of(status, b"\nRssAnon:")
            # What the heap gave back to the system still counts as data, but the heap may take it again.
            reusable = min(_heap_free_bytes(), max(0, data - resident))
            available = min(available, max(0, limit - data) + reusable)
        return MemoryReading(used, peak, total, available)

    def _read_portable(self) -> MemoryReading:
        import psutil

        used, host = psutil.Process().memory_info().rss, psutil.virtual_memory()
        self._highest = max(self._highest, used)
        return MemoryReading(used, self._highest, host.total, host.available)

    def _limits(self) -> Iterator[tuple[int, int]]:
        for group in self._groups:
            limit = group.limit_bytes()
            if limit is not None:
                yield limit, group.used_bytes()


def resolve_limit(config: Config, device: str, monitor: MemoryMonitor) -> int:
    """Bytes of `device` that the run may use: the smallest of the settings, and never more than there is.

    `training.memory_limit` always counts, `memory.cpu_memory_limit` on a CPU, `memory.gpu_memory_fraction` on a GPU.
    Percentages are of `monitor`'s total. Raises: ConfigError for a size that is none, MemoryLimitError for a limit
    below what the process holds already.
    """
    reading = monitor.read()
    key, limit = limit_of(config, device, reading.total_bytes)
    if limit <= reading.used_bytes:
        used = format_bytes(reading.used_bytes)
        raise MemoryLimitError(f"the limit of {format_bytes(limit)} is below the {used} in use before training",
                               where=key, fix=f"allow more than {used}")  # fmt: skip
    return limit


def limit_of(config: Config, device: str, total_bytes: int) -> tuple[str, int]:
    """The setting that counts and the limit it gives on a device of `total_bytes`. Raises: ConfigError."""
    settings: dict[str, str | int | None] = {"training.memory_limit": config.training.memory_limit}
    if device == "cpu":
        settings["memory.cpu_memory_limit"] = config.memory.cpu_memory_limit
    else:
        settings["memory.gpu_memory_fraction"] = f"{100 * config.memory.gpu_memory_fraction:f}%"
    sizes = {key: _size(key, value, total_bytes) for key, value in settings.items() if value is not None}
    key = min(sizes, key=sizes.__getitem__)
    if sizes[key] > total_bytes:
        logger.warning("%s is more than the %s of this machine", key, format_bytes(total_bytes))
    return key, min(sizes[key], total_bytes)


def format_bytes(count: float) -> str:
    """`count` bytes for a person, with three digits: 1.23 GB, 45.6 MB. Powers of 1000, as in the settings."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


def _size(key: str, value: str | int, total: int) -> int:
    try:
        size = parse_size(value, total=total)
    except ConfigError as error:
        raise ConfigError(error.what, where=key, fix=error.fix or "write a size such as 8GB, or 90%") from error
    if size == 0:
        raise ConfigError("a limit of 0 bytes", where=key, fix="write a size such as 8GB, or 90%")
    return size


def _bytes_of(text: bytes, name: bytes) -> int:
    """A value in kB of a /proc file, in bytes; 0 where the kernel does not give it."""
    start = text.find(name)
    return int(text[start + len(name) : text.index(b"kB", start)]) * 1024 if start >= 0 else 0


class _Mallinfo2(ctypes.Structure):
    """mallinfo2(3) of glibc from 2.33 on."""

    _fields_ = (
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def _heap_free_bytes() -> int:
    """Bytes of glibc's heaps that nothing uses, resident or not; 0 with another C library."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform.startswith("linux") else None
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo2
    return int(mallinfo().fordblks)


def _data_limit() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft


def _require_cuda(device: str) -> None:
    import torch

    if not device.startswith("cuda"):
        raise MissingError(f"the memory of device {device!r} cannot be read", fix="use cpu or cuda")
    if not torch.cuda.is_available():
        raise MissingError(f"no CUDA device for {device!r}", where="processing.device", fix="set it to auto or cpu")


def _read_cuda(device: str) -> MemoryReading:
    import torch

    used, free_total = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - used
    return MemoryReading(used, torch.cuda.max_memory_allocated(device), free_total[1], free_total[0] + cached)
