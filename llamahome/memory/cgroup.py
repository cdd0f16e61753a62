"""Limits that control groups (v1 and v2) put on this process' memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

_UNLIMITED = 1 << 62  # v1 writes "none" as the largest number of whole pages


@dataclass(frozen=True)
class MemoryGroup:
    """One control group with a memory controller, or one of its ancestors."""

    folder: Path
    version: int

    @cached_property
    def files(self) -> list[Path]:
        """Files that hold a limit. v2's `memory.high` counts: beyond it the kernel stalls the process."""
        names = ("memory.max", "memory.high") if self.version == 2 else ("memory.limit_in_bytes",)
        return [self.folder / name for name in names]

    def limit_bytes(self) -> int | None:
        """The limit now, or None where there is none."""
        limits = [_read_number(path) for path in self.files]
        return min((limit for limit in limits if limit is not None and limit < _UNLIMITED), default=None)

    def used_bytes(self) -> int:
        """Memory charged to the group, without file pages that the kernel would drop first."""
        name, key = ("memory.current", b"inactive_file") if self.version == 2 else (
            "memory.usage_in_bytes", b"total_inactive_file"
        )  # fmt: skip
        return max(0, (_read_number(self.folder / name) or 0) - _statistic(self.folder / "memory.stat", key))


def memory_groups(root: Path = Path("/")) -> list[MemoryGroup]:
    """The memory groups that this process is in, from its own up to the topmost one that can be seen.

    `root` stands for `/`. Empty where the system has no control groups.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    places = {version: (mount, point) for version, mount, point in _mounts(mounts)}
    groups = []
    for line in memberships:
        hierarchy, controllers, path = line.split(":", 2)
        version = 2 if hierarchy == "0" and not controllers else 1
        if version in places and (version == 2 or "memory" in controllers.split(",")):
            mount, point = places[version]
            groups += [MemoryGroup(folder, version) for folder in _folders(root, point, mount, path)]
    return groups


def _mounts(lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """(version, path of the group that is mounted, where) of each mounted memory hierarchy."""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split(maxsplit=2)
        if kind == "cgroup2":
            yield 2, fields[3], fields[4]
        elif kind == "cgroup" and "memory" in options.split(","):
            yield 1, fields[3], fields[4]


def _folders(root: Path, point: str, mount: str, path: str) -> Iterator[Path]:
    """The group's folder and its ancestors below the mount point; a container sees only a part of the tree."""
    top = PurePosixPath(point).relative_to("/")
    inside = PurePosixPath(path)
    parts = inside.relative_to(mount).parts if inside.is_relative_to(mount) else ()
    parts = () if ".." in parts else tuple(part for part in parts if part != "/")
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(top, *parts[:depth])
        if folder.is_dir():
            yield folder


def read_small(path: Path) -> bytes:
    """The start of a small file of /proc or /sys, empty if it is not there; half the time of `Path.read_bytes`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 16384)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def oom_kills(root: Path = Path("/")) -> int:
    """Processes that the kernel has killed for want of memory since this machine started; 0 where it does not count."""
    return _statistic(root / "proc/vmstat", b"oom_kill")


def _read_number(path: Path) -> int | None:
    text = read_small(path).strip()
    return int(text) if text.isdigit() else None


def _statistic(path: Path, key: bytes) -> int:
    lines = read_small(path).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(key + b" ")), 0)
