"""A run that is killed, or told that the disk is full, at any system call of a save loses nothing that it had."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Config
from llamahome.files import publish_folder
from llamahome.training.run import train

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    return library


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: no fsync has to wait for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(0, id="killed"),
        pytest.param(errno.ENOSPC, id="disk full"),
        pytest.param(errno.EIO, id="disk broken", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("script", ["failing_saves.py", "failing_stores.py"])
def test_at_every_system_call(
    script: str, error: int, shim: Path, quick_disk: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two saves of checkpoints with their retention and `best`; an entry of the cache, records, state and `final`."""
    answer = subprocess.run(
        [sys.executable, HERE / script, quick_disk, str(error)],
        env=os.environ | {"LD_PRELOAD": str(shim)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["faults"] == []
    assert result["calls"] > 100
    record_property("failing calls" if error else "kills", result["calls"])


def test_all_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        events.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    with publish_folder(tmp_path / "run" / "best") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("x")
        (folder / "b").write_text("x")
    renamed = events.index(("rename", "best"))
    assert {name for _, name in events[:renamed]} == {"a", "b", "inner", folder.name}
    assert events[renamed + 1 :] == [("fsync", "run")]


def test_records_are_on_disk_before_their_checkpoint(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        events.append(Path(target).name)
        rename(source, target)

    settings = place.settings | {"optimization.max_steps": 2, "training.save_steps": 1}
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    train(Config.load(None, settings))
    order = [name for name in events if name == "metrics.jsonl" or name in ("checkpoint-1", "checkpoint-2")]
    assert order == ["metrics.jsonl", "checkpoint-1", "metrics.jsonl", "checkpoint-2"]
