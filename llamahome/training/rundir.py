"""The folder of a run: its lock, status.json and run.json."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from llamahome.errors import CheckpointError, StorageError, UsageError
from llamahome.files import is_leftover, remove_leftovers, storage_errors, write_json
from llamahome.memory.agree import BUDGET_FILE
from llamahome.memory.monitor import format_bytes
from llamahome.monitor.report import REPORT_FILE
from llamahome.monitor.sinks import METRICS_FILE

State = Literal["running", "done", "stopped", "failed"]
STATUS_FILE = "status.json"
# What a run leaves that ended before its first checkpoint.
_UNFINISHED = {".lock", STATUS_FILE, "run.json", METRICS_FILE, REPORT_FILE, "tensorboard", BUDGET_FILE, "failures"}
_PACKAGES = ("llamahome", "torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")


class RunFolder:
    """One run's folder, held by a lock that the system drops when the process dies.

    Raises: UsageError when `fresh` and the folder already holds files, other than those of a run that ended before its
    first checkpoint; StorageError when it cannot be written or another process holds it.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path.resolve()
        with storage_errors(path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            with storage_errors(path):
                if fresh:
                    self._begin_anew()
                remove_leftovers(self.path, locked=True)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def write_status(self, state: State, code: int | None, message: str, step: int, *, resumable: bool) -> None:
        """state, exit code, message, last step and whether train-resume can go on."""
        content = {"state": state, "code": code, "message": message, "last_step": step, "resumable": resumable}
        write_json(self.path / STATUS_FILE, {**content, "pid": os.getpid(), "time": _now()})

    def write_run(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Everything needed to see what ran, and to run it again."""
        content = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": _now(),
            **facts,
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
            "git_revision": _git_revision(),
            "hardware": {
                "machine": platform.machine(),
                "system": platform.platform(),
                "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            },
            "config": config,
        }
        write_json(self.path / "run.json", content)

    def require_free(self, needed: int) -> None:
        """Raises: StorageError when the disk has less than `needed` bytes free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise StorageError(
                f"{format_bytes(free)} free, {format_bytes(needed)} needed (checkpoints, resource.min_free_disk)",
                where=str(self.path), fix="free some space, choose another --output or lower resource.min_free_disk",
            )  # fmt: skip

    def require_unused(self) -> set[str]:
        """The names in the folder that a run which ended before its first checkpoint has left.

        Raises: UsageError when there are others.
        """
        names = {path.name for path in self.path.iterdir() if not is_leftover(path)}
        allowed = _UNFINISHED if STATUS_FILE in names else {".lock"}
        if names - allowed:
            raise UsageError(
                "the output folder already holds files", where=str(self.path),
                fix="choose another --output, or continue the run with train-resume",
            )  # fmt: skip
        return names

    def _begin_anew(self) -> None:
        for name in self.require_unused() - {".lock", BUDGET_FILE}:  # the smaller cut is for the run that begins anew
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _take_lock(self) -> IO[str]:
        with storage_errors(self.path):
            file = (self.path / ".lock").open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise StorageError(
                    f"the folder is in use by {holder}", where=str(self.path),
                    fix="wait for it, or choose another --output",
                ) from error  # fmt: skip
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        return file


@contextmanager
def trial_folder(path: Path) -> Iterator[RunFolder]:
    """The folder of a run that is only tried: checked and locked as a run's is, and afterwards as it was before.

    Raises: UsageError, StorageError.
    """
    new = [folder for folder in (path.resolve(), *path.resolve().parents) if not folder.exists()]
    had_lock = (path / ".lock").exists()
    try:
        with RunFolder(path, fresh=False) as folder:
            folder.require_unused()
            yield folder
    finally:
        if not had_lock:
            (path / ".lock").unlink(missing_ok=True)
        for made in new:
            if made.exists() and not any(made.iterdir()):
                made.rmdir()


def read_run(run: Path) -> dict[str, Any]:
    """What `write_run` wrote. Raises: CheckpointError."""
    try:
        content: dict[str, Any] = json.loads((run / "run.json").read_bytes())
        content["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "run.json is missing or damaged", where=str(run.absolute()), fix="name a run folder, or a checkpoint in it"
        ) from error
    return content


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the folder the run was started in, where it is a git checkout."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
