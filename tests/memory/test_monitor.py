"""What the process uses and may use, read from the real system and from made-up ones."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamahome.errors import ConfigError, MemoryLimitError, MissingError
from llamahome.memory.monitor import MemoryMonitor, MemoryReading, format_bytes, resolve_limit

MB = 1_000_000
GIB = 1 << 30
STATUS = "Name:\tx\nVmHWM:\t  300000 kB\nVmRSS:\t  200000 kB\nVmData:\t  150000 kB\n"
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1000000 kB\nMemAvailable:    8388608 kB\n"
V1 = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
V1 += "35 31 0:32 {mount} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2 = "35 31 0:32 {mount} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def system(root: Path, membership: str = "", mounts: str = "", **files: str) -> Path:
    """A fake `/` with /proc files, and control group files by path below /sys/fs/cgroup (`__` for `/`)."""
    contents = {
        "proc/self/status": STATUS,
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": membership,
        "proc/self/mountinfo": mounts,
    }
    for path, text in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def group(root: Path, folder: str, **files: str) -> None:
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text + "\n")


class TestReal:
    def test_reading_follows_the_memory_of_this_process(self) -> None:
        monitor = MemoryMonitor()
        before = monitor.read()
        with mmap.mmap(-1, 80 * MB) as block:
            block.write(b"x" * (80 * MB))
            during = monitor.read()
        after = monitor.read()
        assert during.used_bytes - before.used_bytes > 70 * MB
        assert after.used_bytes < during.used_bytes - 70 * MB
        # The kernel counts pages per processor and adds them up late: a megabyte of the two may differ.
        assert after.peak_bytes >= during.used_bytes - MB

    @pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
    def test_peak_can_begin_anew(self) -> None:
        monitor = MemoryMonitor()
        with mmap.mmap(-1, 80 * MB) as block:
            block.write(b"x" * (80 * MB))
        high = monitor.read().peak_bytes
        assert monitor.reset_peak()
        assert monitor.read().peak_bytes < high - 60 * MB

    def test_reading_is_cheap(self) -> None:
        monitor = MemoryMonitor()
        started = time.process_time()
        for _ in range(200):
            monitor.read()
        assert (time.process_time() - started) / 200 < 2e-4  # 60 us alone; the margin is for a busy machine

    @pytest.mark.skipif(sys.platform == "win32", reason="needs rlimits")
    def test_data_limit_counts(self) -> None:
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_DATA, (700_000_000, -1));"
            "from llamahome.memory.monitor import MemoryMonitor; r = MemoryMonitor().read();"
            "print(r.total_bytes, r.available_bytes)"
        )
        total, available = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
        assert total == 700_000_000
        assert 500_000_000 < available < total

    @pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA as Linux counts it")
    def test_the_heap_may_take_again_what_it_gave_back(self) -> None:
        """After malloc_trim the pages still count as data; the room must not shrink by them."""
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_DATA, (700_000_000, -1));"
            "from llamahome.memory.monitor import MemoryMonitor; from llamahome.memory.oom import _trim_heap;"
            "m = MemoryMonitor(); room = lambda r: r.used_bytes + r.available_bytes; before = room(m.read());"
            "held = [bytes(50_000) for _ in range(4000)]; keep = bytes(50_000); del held; _trim_heap()(0);"
            "r = m.read(); data = int(open('/proc/self/status').read().split('VmData:')[1].split()[0]) * 1024;"
            "print(data > r.used_bytes + 150_000_000, before - room(r))"
        )
        held, lost = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        assert held == "True", "the heap was expected to keep its addresses"
        assert int(lost) < 20_000_000


class TestFakeSystem:
    def test_without_groups_the_host_counts(self, tmp_path: Path) -> None:
        reading = MemoryMonitor(root=system(tmp_path)).read()
        assert reading == MemoryReading(200000 * 1024, 300000 * 1024, 16 * GIB, 8 * GIB)

    def test_the_smallest_limit_on_the_way_up_counts_in_v2(self, tmp_path: Path) -> None:
        system(tmp_path, "0::/a/b\n", V2.format(mount="/"))
        group(tmp_path, "a/b", memory__max="max", memory__current=str(GIB))
        group(
            tmp_path, "a", memory__max=str(4 * GIB), memory__current=str(3 * GIB), memory__stat="inactive_file 1048576"
        )
        reading = MemoryMonitor(root=tmp_path).read()
        assert reading.total_bytes == 4 * GIB
        assert reading.available_bytes == GIB + (1 << 20)

    def test_memory_high_stalls_and_so_counts(self, tmp_path: Path) -> None:
        system(tmp_path, "0::/a\n", V2.format(mount="/"))
        group(tmp_path, "a", memory__max=str(4 * GIB), memory__high=str(2 * GIB), memory__current="0")
        assert MemoryMonitor(root=tmp_path).read().total_bytes == 2 * GIB

    def test_v1_limit_and_usage(self, tmp_path: Path) -> None:
        system(tmp_path, "7:cpu:/z\n4:memory:/a/b\n0::/\n", V1.format(mount="/"))
        group(tmp_path, "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="0")
        group(tmp_path, "memory/a", memory__limit_in_bytes=str(6 * GIB), memory__usage_in_bytes=str(5 * GIB))
        group(tmp_path, "memory/a/b", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="1")
        reading = MemoryMonitor(root=tmp_path).read()
        assert (reading.total_bytes, reading.available_bytes) == (6 * GIB, GIB)

    def test_a_container_sees_its_own_group_as_the_top(self, tmp_path: Path) -> None:
        system(tmp_path, "4:memory:/docker/abc\n", V1.format(mount="/docker/abc"))
        group(tmp_path, "memory", memory__limit_in_bytes=str(3 * GIB), memory__usage_in_bytes="0")
        assert MemoryMonitor(root=tmp_path).read().total_bytes == 3 * GIB

    def test_a_limit_that_changes_is_seen(self, tmp_path: Path) -> None:
        system(tmp_path, "0::/a\n", V2.format(mount="/"))
        group(tmp_path, "a", memory__max=str(4 * GIB), memory__current="0")
        monitor = MemoryMonitor(root=tmp_path)
        group(tmp_path, "a", memory__max=str(2 * GIB))
        assert monitor.read().total_bytes == 2 * GIB

    def test_without_proc_psutil_answers(self, tmp_path: Path) -> None:
        monitor = MemoryMonitor(root=tmp_path)
        reading = monitor.read()
        assert 0 < reading.used_bytes <= reading.peak_bytes < reading.total_bytes
        assert monitor.reset_peak()


def test_a_gpu_that_is_not_there_is_named() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MissingError, match="cuda:0"):
        MemoryMonitor("cuda:0")


def settings(limit: str | int = "90%", cpu: str | int | None = None, gpu: float = 0.9) -> Any:
    return SimpleNamespace(
        training=SimpleNamespace(memory_limit=limit),
        memory=SimpleNamespace(cpu_memory_limit=cpu, gpu_memory_fraction=gpu),
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (settings("50%"), 8 * GIB),
        (settings("3GiB"), 3 * GIB),
        (settings("50%", cpu="25%"), 4 * GIB),
        (settings("2GiB", cpu="25%"), 2 * GIB),
        (settings("90%", cpu=5 * GIB), 5 * GIB),
        (settings("100%"), 16 * GIB),
        (settings("900GB"), 16 * GIB),
        (settings("50%", gpu=0.1), 8 * GIB),
    ],
)
def test_the_smallest_setting_is_the_limit(tmp_path: Path, config: Any, expected: int) -> None:
    assert resolve_limit(config, "cpu", MemoryMonitor(root=system(tmp_path))) == expected


def test_a_gpu_has_its_fraction(tmp_path: Path) -> None:
    monitor = MemoryMonitor(root=system(tmp_path))
    assert resolve_limit(settings("90%", cpu="1%", gpu=0.25), "cuda", monitor) == 4 * GIB


@pytest.mark.parametrize(
    ("config", "kind", "text"),
    [
        (settings("0GB"), ConfigError, "training.memory_limit"),
        (settings("150%"), ConfigError, "training.memory_limit"),
        (settings("lots"), ConfigError, "training.memory_limit"),
        (settings("90%", cpu="0%"), ConfigError, "memory.cpu_memory_limit"),
        (settings("100MB"), MemoryLimitError, "allow more than 205 MB"),
        (settings("90%", cpu="1%"), MemoryLimitError, "memory.cpu_memory_limit"),
    ],
)
def test_an_impossible_limit_names_its_key(tmp_path: Path, config: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        resolve_limit(config, "cpu", MemoryMonitor(root=system(tmp_path)))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (45_600_000, "45.6 MB"), (8e9, "8.00 GB"), (2e14, "200 TB")],
)
def test_bytes_for_a_person(count: float, text: str) -> None:
    assert format_bytes(count) == text
