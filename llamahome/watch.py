"""Look on at a run, in progress or over: `llamahome watch`. Only reads what the run writes, so it cannot slow it."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamahome.errors import UsageError
from llamahome.files import process_runs, read_json

if TYPE_CHECKING:
    from llamahome.monitor.progress import Progress

_POLL_SECONDS = 0.5
_CAUGHT_UP = 21  # records of the past that are shown: as many as the pace is a mean of
_HOLDER = re.compile(r"process (\d+) on (.+)")


class Tail:
    """The JSON lines that were added to a file since the last look; from its beginning when it became shorter."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0

    def read(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]  # the last line may still be written
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def watch(
    folder: Path, build_view: Callable[[Callable[[], float]], Progress], *, sleep: Callable[[float], None] = time.sleep
) -> str:
    """Show the run in `folder` until it ends; returns its state in a line.

    `build_view` is given the run's own clock, the sum of its steps' seconds.
    Raises: UsageError when `folder` is none of a run.
    """
    from llamahome.monitor.sinks import METRICS_FILE

    if not (folder / "status.json").is_file():
        raise UsageError("no status.json", where=str(folder), fix="name the folder of a run")
    elapsed = 0.0
    tail, view = Tail(folder / METRICS_FILE), build_view(lambda: elapsed)
    past: deque[dict[str, Any]] = deque(tail.read(), maxlen=_CAUGHT_UP)
    first = next((record["step"] for record in past if _is_step(record)), 1)
    view.start(_total_steps(folder), int(first) - 1)
    try:
        while True:
            running = is_running(folder)  # asked before the last look, so that no record is missed
            for record in [*past, *tail.read()]:
                elapsed += record.get("step_seconds") or 0.0
                _show(view, record)
            past.clear()
            if not running:
                return _ending(folder)
            sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return "the run goes on"
    finally:
        view.finish()


def is_running(folder: Path) -> bool:
    """Whether the run says that it runs and, where that can be seen from here, its process is alive."""
    if read_json(folder / "status.json").get("state") != "running":
        return False
    try:
        holder = _HOLDER.fullmatch((folder / ".lock").read_text().strip())
    except OSError:
        return True
    return holder is None or holder[2] != socket.gethostname() or process_runs(int(holder[1]))


def _show(view: Progress, record: dict[str, Any]) -> None:
    if "event" not in record:
        if _is_step(record):
            view.step(record)
            if "eval_loss" in record:
                view.evaluation(record)
    elif record["event"] == "evaluation":
        view.evaluation(record)
    else:
        view.event(record)


def _is_step(record: dict[str, Any]) -> bool:
    return "event" not in record and isinstance(record.get("step"), int)


def _total_steps(folder: Path) -> int:
    total = read_json(folder / "run.json").get("total_steps")
    return total if isinstance(total, int) else 0


def _ending(folder: Path) -> str:
    status = read_json(folder / "status.json")
    if status.get("state") == "running":
        return f"the run's process is gone; go on with: llamahome train-resume {folder}"
    return f"{status.get('state')} at step {status.get('last_step')}: {status.get('message')}"
