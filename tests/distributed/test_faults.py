"""A signal on one rank is that of all; one that dies or stands still is named, and no rank is left waiting."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def status(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content


def long_run(place: Any, run: Path, **changes: object) -> list[str]:
    words: list[str] = place.train(run, optimization__max_steps=2000, training__save_steps=1000, **changes)
    return words


def test_a_signal_on_one_rank_saves_on_all(place: Any, crew: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = crew.start(long_run(place, run, training__method="full", distributed__strategy="shard"), 2)
    wait_for_step(run, 2)
    os.kill(ranks.pids[1], signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert ranks.end() == [143, 143]
    found = status(run)
    assert (found["state"], found["code"], found["resumable"]) == ("stopped", 143, True)
    assert (run / f"checkpoint-{found['last_step']}").is_dir()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_is_named(place: Any, crew: Any, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    ranks = crew.start(long_run(place, run, distributed__timeout=4), 2)
    wait_for_step(run, 2)
    os.kill(ranks.pids[1], number)
    assert ranks.end() == [8, -signal.SIGKILL]  # one that stands still is killed by the other
    found = status(run)
    assert (found["state"], found["code"]) == ("failed", 8)
    assert "rank 1" in found["message"]
