"""Watching shows what the run writes, from where it stands to its end, and takes nothing for it that is not there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import UsageError
from llamahome.watch import Tail, is_running, watch


class Seen:
    """A view that remembers."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.steps, self.events, self.evaluations, self.finished = clock, [], [], [], False

    def start(self, total_steps: int, step: int = 0) -> None:
        self.started = (total_steps, step)

    def step(self, record: Mapping[str, Any]) -> None:
        self.steps.append((record["step"], self.clock()))

    def event(self, event: Mapping[str, Any]) -> None:
        self.events.append(event["event"])

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self.evaluations.append(record["eval_loss"])

    def finish(self, summary: str = "") -> None:
        self.finished = True


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 50 steps whose process is this one."""
    (tmp_path / "run.json").write_text('{"total_steps": 50}')
    (tmp_path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    write(tmp_path, *({"step": n, "step_seconds": 2.0} for n in range(1, 41)))
    status(tmp_path, "running")
    return tmp_path


def status(run: Path, state: str) -> None:
    (run / "status.json").write_text(json.dumps({"state": state, "last_step": 50, "message": "finished"}))


def write(run: Path, *records: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_it_follows_a_run_to_its_end(run: Path) -> None:
    rest = iter(range(41, 51))

    def go_on(_seconds: float) -> None:
        write(run, {"step": (step := next(rest)), "step_seconds": 2.0, **({"eval_loss": 1.5} if step == 50 else {})})
        if step == 45:
            write(run, {"event": "oom", "step": 45})
        if step == 50:
            status(run, "done")

    views: list[Seen] = []
    ending = watch(run, lambda clock: views.append(Seen(clock)) or views[0], sleep=go_on)  # type: ignore[func-returns-value]
    view = views[0]
    assert ending == "done at step 50: finished"
    assert view.started == (50, 19)
    assert [step for step, _ in view.steps] == list(range(20, 51))
    assert view.steps[1][1] - view.steps[0][1] == 2.0  # the run's seconds, not those of the one who looks on
    assert (view.events, view.evaluations, view.finished) == (["oom"], [1.5], True)


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.read()) == []
    path.write_text('{"step": 1}\n{"step"')
    assert list(tail.read()) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2}\nnot json\n')
    assert list(tail.read()) == [{"step": 2}]
    path.write_text('{"step": 7}\n')  # a resumed run cut the file
    assert list(tail.read()) == [{"step": 7}]


def test_a_run_whose_process_was_killed_is_not_waited_for(run: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (run / ".lock").write_text(f"process {child.pid} on {socket.gethostname()}")
    assert is_running(run)
    child.kill()
    child.communicate()
    assert not is_running(run)
    assert "train-resume" in watch(run, Seen, sleep=lambda seconds: pytest.fail("it waits"))


def test_a_process_on_another_machine_is_believed(run: Path) -> None:
    (run / ".lock").write_text("process 999999 on elsewhere")
    assert is_running(run)


def test_ctrl_c_ends_the_watching_only(run: Path) -> None:
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    assert watch(run, Seen, sleep=interrupt) == "the run goes on"
    assert is_running(run)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder of a run"):
        watch(tmp_path, Seen)
