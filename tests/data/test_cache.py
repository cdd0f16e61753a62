"""The cache: built once, never half there, never evicted under a reader, within its age and size."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llamahome.config import Config
from llamahome.data.cache import Cache, cache_folder
from llamahome.errors import DataError, StorageError

DAY = 86400.0


def make(folder: Path, *, max_bytes: int = 10**9, max_age: float = 7 * DAY, interval: float = 3600) -> Cache:
    return Cache(folder / "cache", max_bytes, max_age, interval)


def fill(content: str = "x", size: int = 1):
    def build(folder: Path) -> None:
        (folder / "data").write_text(content * size)

    return build


def forbidden(folder: Path) -> None:
    raise AssertionError("built twice")


def age(cache: Cache, key: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(cache.folder / f"{key}.lock", (then, then))


def test_an_entry_is_built_once_and_kept(tmp_path):
    cache = make(tmp_path)
    with_first = cache.get("a", fill("one"))
    again = cache.get("a", forbidden)
    assert (again.path / "data").read_text() == (with_first.path / "data").read_text() == "one"
    assert [info.key for info in cache.entries()] == ["a"]


def test_a_failed_build_leaves_nothing(tmp_path):
    cache = make(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise DataError("no good")

    with pytest.raises(DataError, match="no good"):
        cache.get("a", fail)
    assert [path.name for path in cache.folder.iterdir()] == ["a.lock"]
    assert (cache.get("a", fill("two")).path / "data").read_text() == "two"


def test_nobody_waits_for_who_uses_an_entry(tmp_path, monkeypatch):
    """Another process builds and begins to train between our look and our turn to build."""
    cache = make(tmp_path)
    others: list = []
    lock = Cache._lock

    def meanwhile(self, key, mode):
        if mode & fcntl.LOCK_EX and not others:
            others.append(None)
            others.append(cache.get(key, fill("theirs")))
        return lock(self, key, mode)

    monkeypatch.setattr(Cache, "_lock", meanwhile)
    assert (cache.get("a", forbidden).path / "data").read_text() == "theirs"


def test_threads_build_once(tmp_path):
    cache = make(tmp_path)
    built, found = [], []

    def slow(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.1)
        fill("x")(folder)

    threads = [threading.Thread(target=lambda: found.append(cache.get("a", slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(found) == 8


SCRIPT = """
import sys, time
from pathlib import Path
from llamahome.data.cache import Cache

folder, log = Path(sys.argv[1]), Path(sys.argv[2])

def build(target):
    with log.open("a") as file:
        file.write("built\\n")
    for i in range(int(sys.argv[3])):
        (target / f"part-{i}").write_text("x" * 1000)
        time.sleep(0.01)
    (target / "whole").write_text("yes")

print("ready", flush=True)
sys.stdin.readline()
entry = Cache(folder, 10**9, 1e6, 3600).get("key", build)
print((entry.path / "whole").read_text(), flush=True)
"""


def start(tmp_path: Path, parts: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache"), str(tmp_path / "log"), str(parts)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_build_once(tmp_path):
    processes = [start(tmp_path, 30) for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["yes\n", "yes\n"]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_is_never_used_and_is_swept(tmp_path):
    for delay in (0.0, 0.03, 0.1, 0.2):
        process = start(tmp_path, 50)
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "cache" / "key").exists()
    cache = make(tmp_path)
    cache.clean()
    assert [path.name for path in cache.folder.iterdir() if path.is_dir()] == []
    entry = cache.get("key", fill("whole"))
    assert [path.name for path in entry.path.iterdir()] == ["data"]


def test_a_running_build_is_not_swept(tmp_path):
    process = start(tmp_path, 100)
    process.stdin.write("\n")
    process.stdin.flush()
    while not list((tmp_path / "cache").glob(".key.tmp-*/part-3")):
        time.sleep(0.01)
    make(tmp_path).clean()
    assert process.communicate(timeout=60)[0] == "yes\n"


def test_the_longest_unused_go_first_and_only_as_many_as_needed(tmp_path):
    cache = make(tmp_path, max_bytes=2500)
    for number, key in enumerate("abcd"):
        cache.get(key, fill(size=1000)).close()
        age(cache, key, 100 - number)
    cache.get("a", forbidden).close()  # used just now
    cache.clean()
    assert [info.key for info in cache.entries()] == ["a", "d"]


def test_old_entries_go_even_where_there_is_room(tmp_path):
    cache = make(tmp_path, max_age=DAY)
    for key, seconds in (("old", 2 * DAY), ("new", 0.5 * DAY)):
        cache.get(key, fill()).close()
        age(cache, key, seconds)
    cache.clean()
    assert [info.key for info in cache.entries()] == ["new"]


def test_an_entry_in_use_is_never_evicted(tmp_path):
    cache = make(tmp_path, max_bytes=0, max_age=0.0, interval=0)
    entry = cache.get("a", fill())
    age(cache, "a", DAY)
    cache.clean()
    assert cache.clear() == []
    assert (entry.path / "data").exists()
    [info] = cache.entries()
    assert info.in_use
    entry.close()
    entry.close()
    assert [gone.key for gone in cache.clear()] == ["a"]
    assert cache.entries() == []


def test_an_entry_is_released_with_its_object(tmp_path):
    cache = make(tmp_path)
    cache.get("a", fill())
    assert [info.in_use for info in cache.entries()] == [False]


def test_the_cache_is_looked_through_once_per_interval(tmp_path):
    cache = make(tmp_path, max_bytes=0, interval=3600)
    cache.get("a", fill()).close()
    cache.get("b", fill()).close()
    assert {info.key for info in cache.entries()} == {"a", "b"}
    os.utime(cache.folder / ".cleaned", (0, 0))
    cache.get("c", fill())
    assert {info.key for info in cache.entries()} == {"c"}


def test_whoever_waited_for_an_evicted_entry_builds_it_again(tmp_path):
    """The evictor removes the lock file that a waiting process has open."""
    cache = make(tmp_path)
    cache.get("a", fill("old")).close()
    found = []
    with cache._unused("a") as unused:
        assert unused
        waiting = threading.Thread(target=lambda: found.append(cache.get("a", fill("new"))))
        waiting.start()
        time.sleep(0.1)
        (cache.folder / "a" / "data").unlink()
        (cache.folder / "a").rmdir()
        (cache.folder / "a.lock").unlink()
    waiting.join(10)
    assert (found[0].path / "data").read_text() == "new"
    assert not cache.discard("a")


def test_a_folder_that_cannot_be_used_means_a_temporary_one(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    entry = make(tmp_path / "file").get("a", fill("x"))
    assert (entry.path / "data").read_text() == "x"
    assert caplog.text.count("the cache is not used: cannot write") == 1
    path = entry.path
    entry.close()
    assert not path.exists()


def test_a_full_cache_disk_means_a_temporary_folder(tmp_path, caplog):
    cache = make(tmp_path)

    def build(folder: Path) -> None:
        if cache.folder in folder.parents:
            raise OSError(28, "No space left on device")
        fill("x")(folder)

    entry = cache.get("a", build)
    assert (entry.path / "data").read_text() == "x"
    assert "No space left on device" in caplog.text
    assert cache.entries() == []


def test_no_room_anywhere_is_an_error(tmp_path):
    def build(folder: Path) -> None:
        raise StorageError("cannot write: No space left on device", where=str(folder))

    with pytest.raises(StorageError, match="No space left"):
        make(tmp_path).get("a", build)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")
def test_a_read_only_cache_still_serves(tmp_path):
    cache = make(tmp_path)
    cache.get("a", fill("old")).close()
    for path in (tmp_path, *tmp_path.parents, cache.folder, cache.folder / "a"):
        if "pytest" in str(path):
            path.chmod(0o755)
    code = f"""
from pathlib import Path
from llamahome.data.cache import Cache
cache = Cache(Path({str(cache.folder)!r}), 10**9, 1e6, 0)
print((cache.get("a", None).path / "data").read_text(), [info.key for info in cache.entries()])
"""
    command = ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True)
    if "Permission denied" in found.stderr and "site-packages" in found.stderr:
        pytest.skip("another user cannot run this Python")
    assert found.stdout == "old ['a']\n", found.stderr


def test_the_settings_decide_place_age_and_size(tmp_path, monkeypatch):
    config = Config.load(None, {"cache.disk_size": 5, "memory.cache_ttl": 60, "cache.cleanup_interval": 7})
    cache = Cache.from_config(config)
    assert cache.folder.is_relative_to(os.environ["LLAMAHOME_CACHE"])
    assert (cache.max_bytes, cache.max_age, cache.cleanup_interval) == (5_000_000, 60, 7)
    assert cache_folder(Config.load(None, {"cache.dir": str(tmp_path)})) == tmp_path
    monkeypatch.delenv("LLAMAHOME_CACHE")
    assert cache_folder(Config()) == Path.home() / ".cache" / "llamahome"
