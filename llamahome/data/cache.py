"""A cache of folders by key: built once by whoever comes first, published by a rename, evicted by age and size.

Every user of an entry holds a shared lock on its lock file, a builder and an evictor an exclusive one. Locks end with
their process, so a kill at any moment leaves at most a hidden temporary folder, which the next clean-up removes.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from llamahome.errors import StorageError
from llamahome.files import publish_folder, remove_folder, storage_errors

if TYPE_CHECKING:
    from llamahome.config import Config

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_STAMP = ".cleaned"
_LEFT_BEHIND = re.compile(r"\.(.+)\.(tmp|del)-\d+")
_TOKENS = "tokens"
_RETRY_SECONDS = 0.01


@dataclass(frozen=True)
class CacheInfo:
    """One entry: bytes on disk, and when it was last used (seconds since the epoch)."""

    key: str
    path: Path
    bytes: int
    last_used: float
    in_use: bool


class Entry:
    """A folder of the cache that nobody evicts until `close`, or until this object is gone."""

    def __init__(self, path: Path, release: Callable[[], None]) -> None:
        self.path = path
        self._release = weakref.finalize(self, release)

    def close(self) -> None:
        """Give up the claim. May be called twice."""
        self._release()


@dataclass(frozen=True)
class Cache:
    """Entries below `folder`, at most `max_bytes` in all, unused for at most `max_age` seconds, looked through at most
    every `cleanup_interval` seconds. Safe for any number of processes and threads."""

    folder: Path
    max_bytes: int
    max_age: float
    cleanup_interval: float

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """The cache of tokens that the sections `cache` and `memory` describe."""
        folder = cache_folder(config) / _TOKENS
        return cls(folder, config.cache_disk_bytes, config.cache_max_age_seconds, config.cache.cleanup_interval)

    def get(self, key: str, build: Callable[[Path], None]) -> Entry:
        """The entry of a key; `build` fills an empty folder if it is not there yet.

        Where the cache folder cannot be used, the entry is a private temporary folder, with one warning.
        Raises: what `build` raises; StorageError if there is no room for a temporary folder either.
        """
        try:
            with storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                entry = self._claim(key, build)
                self.clean(force=False)
        except StorageError as error:
            logger.warning("the cache is not used: %s", error)
            return temporary_entry(build)
        return entry

    def _claim(self, key: str, build: Callable[[Path], None]) -> Entry:
        path = self.folder / key
        while True:
            entry = self.hold(key)  # waits for a builder
            if entry:
                with suppress(OSError):  # a read-only cache still serves
                    os.utime(self.folder / f"{key}{_LOCK}")
                return entry
            lock = self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is None:
                # Never wait for this lock: whoever has built meanwhile keeps the entry for as long as it trains.
                time.sleep(_RETRY_SECONDS)
                continue
            try:
                if not path.is_dir():
                    self._remove_leftovers(key)
                    with publish_folder(path) as temporary:
                        build(temporary)
            finally:
                os.close(lock)

    def hold(self, key: str) -> Entry | None:
        """The entry of a key, if it is there; its age stays as it is."""
        lock = self._lock(key, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if lock is None:
            logger.info("another process prepares the same data; waiting for it")
            lock = self._lock(key, fcntl.LOCK_SH)
        assert lock is not None
        path = self.folder / key
        if path.is_dir():
            return Entry(path, partial(os.close, lock))
        os.close(lock)
        return None

    def _lock(self, key: str, mode: int) -> int | None:
        """An open descriptor that holds the lock of a key; None if it is not to be had with LOCK_NB."""
        path = self.folder / f"{key}{_LOCK}"
        while True:
            lock = _open_lock(path)
            try:
                fcntl.flock(lock, mode)
                # An evictor may have removed the file that we waited for.
                with suppress(FileNotFoundError):
                    if os.fstat(lock).st_ino == path.stat().st_ino:
                        return lock
            except BlockingIOError:
                os.close(lock)
                return None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    @contextmanager
    def _unused(self, key: str) -> Iterator[bool]:
        """Whether nobody holds the entry; if so, nobody can until the block ends."""
        lock = _open_lock(self.folder / f"{key}{_LOCK}")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(lock)

    def entries(self) -> list[CacheInfo]:
        """What the cache holds, last used first."""
        found = []
        for path in self.folder.glob("[!.]*"):
            if not path.is_dir():
                continue
            with suppress(OSError), self._unused(path.name) as unused:
                used = (self.folder / f"{path.name}{_LOCK}").stat().st_mtime
                found.append(CacheInfo(path.name, path, folder_bytes(path), used, not unused))
        return sorted(found, key=lambda info: info.last_used, reverse=True)

    def discard(self, key: str) -> bool:
        """Remove an entry unless it is in use; whether it is gone. Raises: StorageError."""
        with storage_errors(self.folder), self._unused(key) as unused:
            if unused:
                remove_folder(self.folder / key)
                (self.folder / f"{key}{_LOCK}").unlink(missing_ok=True)
            return unused

    def clear(self) -> list[CacheInfo]:
        """Remove every entry that is not in use, and return the removed ones. Raises: StorageError."""
        self._sweep()
        return [info for info in self.entries() if self.discard(info.key)]

    def clean(self, *, force: bool = True) -> None:
        """Remove entries that are too old, then the longest unused until the rest fits; never one in use.

        Without `force` only if the last clean-up is `cleanup_interval` seconds ago. Raises: StorageError.
        """
        stamp = self.folder / _STAMP
        if not force and stamp.exists() and time.time() - stamp.stat().st_mtime < self.cleanup_interval:
            return
        with suppress(OSError):
            stamp.touch()
            self._sweep()
            total = 0
            for info in self.entries():
                total += info.bytes
                too_old = time.time() - info.last_used > self.max_age
                if (too_old or total > self.max_bytes) and not info.in_use and self.discard(info.key):
                    total -= info.bytes
                    logger.info("cache: removed %s (%s bytes)", info.key, f"{info.bytes:,}")

    def _sweep(self) -> None:
        """Remove what killed builders and evictors left."""
        for path in self.folder.glob(".*"):
            found = _LEFT_BEHIND.fullmatch(path.name)
            if not found:
                continue
            with self._unused(found[1]) as unused:
                if unused:
                    self._remove_leftovers(found[1])

    def _remove_leftovers(self, key: str) -> None:
        """Only with the exclusive lock of the key."""
        for path in self.folder.glob(f".{key}.*"):
            shutil.rmtree(path, ignore_errors=True)


def cache_folder(config: Config) -> Path:
    """`cache.dir`, else $LLAMAHOME_CACHE, else ~/.cache/llamahome."""
    chosen = config.cache.dir or os.environ.get("LLAMAHOME_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    try:
        return Path.home() / ".cache" / "llamahome"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"llamahome-{os.getuid()}"


def temporary_entry(build: Callable[[Path], None]) -> Entry:
    """A private entry that is deleted when it is closed. Raises: as `Cache.get`."""
    with storage_errors(Path(tempfile.gettempdir())):
        path = Path(tempfile.mkdtemp(prefix="llamahome-"))
    entry = Entry(path, lambda: shutil.rmtree(path, ignore_errors=True))
    try:
        build(path)
    except BaseException:
        entry.close()
        raise
    return entry


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a read-only cache


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total
