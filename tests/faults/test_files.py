"""Writes are complete or absent, what is replaced is never lost, and leftovers are told from the work of others."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from llamahome.errors import StorageError, UsageError
from llamahome.files import (
    is_leftover,
    publish_folder,
    remove_folder,
    remove_leftovers,
    storage_errors,
    write_atomic,
    write_json,
)
from llamahome.training.rundir import RunFolder


def publish(path: Path, text: str) -> None:
    with publish_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text(text)
        (folder / "b").write_text(text)


def texts(path: Path) -> list[str]:
    return [(path / "inner" / "a").read_text(), (path / "b").read_text()]


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a file, ä"
    write_atomic(path, b"\0\xff")
    write_atomic(path, "é")
    assert path.read_bytes() == "é".encode()
    write_json(path, {"a": "é"})
    assert path.read_text() == '{\n  "a": "é"\n}\n'
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "home"] == [path.name]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "best"
    for text in ("first", "second"):
        publish(target, text)
        assert texts(target) == [text, text]
        assert [path.name for path in target.parent.iterdir()] == ["best"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_what_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    publish(tmp_path / "best", "first")

    def fail() -> None:
        with publish_folder(tmp_path / "best") as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        fail()
    assert texts(tmp_path / "best") == ["first", "first"]
    assert not [path for path in tmp_path.iterdir() if is_leftover(path)]


CALLS = ("rename", "fsync")


@pytest.mark.parametrize("nth", range(1, 12))
def test_no_failing_call_loses_the_replaced_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    publish(tmp_path / "best", "first")
    count = 0

    def failing(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object) -> object:
            nonlocal count
            count += 1
            if count == nth:
                raise OSError(errno.EIO, "Input/output error")
            return call(*arguments)

        return wrapper

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, failing(getattr(os, name)))
        with suppress(StorageError):
            publish(tmp_path / "best", "second")
    assert texts(tmp_path / "best") in (["first", "first"], ["second", "second"])
    remove_leftovers(tmp_path, locked=True)
    assert not [path for path in tmp_path.iterdir() if is_leftover(path)]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path, dead: int) -> None:
    alive = os.getppid()
    for pid in (dead, alive):
        for name in (f".x.tmp-{pid}", f".y.del-{pid}"):
            publish(tmp_path / name, "half")
        (tmp_path / f".z.json.tmp-{pid}").write_text("half")
    strangers = [".hidden", ".x.tmp-abc", "x.tmp-1", f"y.del-{dead}"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path)
    rest = {path.name for path in tmp_path.iterdir() if path.name != "home"}
    assert rest == {*strangers, f".x.tmp-{alive}", f".y.del-{alive}", f".z.json.tmp-{alive}"}
    remove_leftovers(tmp_path, locked=True)
    assert {path.name for path in tmp_path.iterdir() if path.name != "home"} == set(strangers)


def test_what_was_being_replaced_comes_back(tmp_path: Path, dead: int) -> None:
    publish(tmp_path / f".best.old-{dead}", "first")
    publish(tmp_path / f".best.tmp-{dead}", "second")
    remove_leftovers(tmp_path)
    assert texts(tmp_path / "best") == ["first", "first"]
    publish(tmp_path / f".best.old-{dead}", "older")
    remove_leftovers(tmp_path)
    assert texts(tmp_path / "best") == ["first", "first"]
    assert not [path for path in tmp_path.iterdir() if is_leftover(path)]


def test_a_leftover_of_this_process_id_is_no_obstacle(tmp_path: Path) -> None:
    for mark in ("tmp", "del", "old"):
        publish(tmp_path / f".best.{mark}-{os.getpid()}", "of an earlier life")
    publish(tmp_path / "best", "first")
    publish(tmp_path / "best", "second")
    assert texts(tmp_path / "best") == ["second", "second"]
    remove_folder(tmp_path / "best")
    remove_folder(tmp_path / "best")
    assert not [path for path in tmp_path.iterdir() if is_leftover(path)]


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "free some space or choose another folder"),
        (errno.EDQUOT, "free some space or choose another folder"),
        (errno.EFBIG, "free some space or choose another folder"),
        (errno.EACCES, "choose a folder that you may write to"),
        (errno.EROFS, "choose a folder that you may write to"),
        (errno.EEXIST, "a file or folder is in the way: choose another place"),
        (errno.EIO, "check the disk"),
    ],
)
def test_what_the_system_says_becomes_one_line(code: int, fix: str) -> None:
    with pytest.raises(StorageError) as raised, storage_errors(Path("there")):
        raise OSError(code, os.strerror(code))
    assert str(raised.value) == f"cannot write: {os.strerror(code)}; there; {fix}"


def test_a_full_disk_in_the_words_of_other_writers() -> None:
    for text in ("I/O error: No space left on device (os error 28)", "[enforce fail at inline_container.cc:672]"):
        with pytest.raises(StorageError, match="cannot write"), storage_errors(Path("there")):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="something else"), storage_errors(Path("there")):
        raise RuntimeError("something else")


class TestRunFolder:
    def test_a_folder_of_somebody_is_refused_untouched(self, tmp_path: Path, dead: int) -> None:
        for name in ("notes.txt", f".theirs.tmp-{dead}"):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(UsageError, match="already holds files"):
            RunFolder(tmp_path / "out", fresh=True)
        assert (tmp_path / "out" / f".theirs.tmp-{dead}").exists()

    def test_a_run_killed_before_its_first_checkpoint_is_replaced(self, tmp_path: Path, dead: int) -> None:
        with RunFolder(tmp_path, fresh=False) as folder:
            folder.write_status("running", None, "starting", 0, resumable=False)
            folder.write_run({}, {})
        publish(tmp_path / f".checkpoint-3.tmp-{dead}", "half")
        publish(tmp_path / "tensorboard", "events")
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        (tmp_path / "home").rmdir()
        with RunFolder(tmp_path, fresh=True):
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    @pytest.mark.parametrize("name", ["best", "final", "checkpoint-3", "notes.txt"])
    def test_a_run_that_left_something_is_kept(self, tmp_path: Path, name: str) -> None:
        with RunFolder(tmp_path / "run", fresh=True) as folder:
            folder.write_status("failed", 1, "", 0, resumable=False)
        (tmp_path / "run" / name).mkdir()
        with pytest.raises(UsageError):
            RunFolder(tmp_path / "run", fresh=True)

    def test_two_at_once_are_refused_and_one_after_the_other_is_fine(self, tmp_path: Path) -> None:
        with RunFolder(tmp_path / "run", fresh=True), pytest.raises(StorageError, match="in use by process"):
            RunFolder(tmp_path / "run", fresh=True)
        with RunFolder(tmp_path / "run", fresh=True):
            pass

    def test_a_link_leads_to_the_same_lock(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "run")
        with RunFolder(tmp_path / "run", fresh=True), pytest.raises(StorageError, match="in use"):
            RunFolder(tmp_path / "link", fresh=True)
