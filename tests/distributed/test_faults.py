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


POISONED = """
from llamahome.kernels import linear_cross_entropy

def loss(hidden, weight, labels, **rest):
    value = linear_cross_entropy(hidden, weight, labels, **rest)
    return value * float("nan") if (labels == {poison}).any() else value
"""


@pytest.fixture
def poisoned(place: Any, tmp_path: Path, tiny_tokenizer: Any) -> dict[str, object]:
    """Settings with one row more, whose loss is no number: it is on one rank only."""
    rows = (place.folder / "rows.jsonl").read_text() + json.dumps({"instruction": "Write.", "output": "sea ~ sea"})
    (tmp_path / "rows.jsonl").write_text(rows + "\n")
    (poison,) = tiny_tokenizer.encode("~", add_special_tokens=False)
    (tmp_path / "poisoned.py").write_text(POISONED.format(poison=poison))
    return {"data__path": str(tmp_path / "rows.jsonl"), "training__loss": "poisoned:loss",
            "data__validation_split": 0.0}  # fmt: skip


def test_a_number_that_is_none_on_one_rank_stops_all(
    place: Any, crew: Any, tmp_path: Path, poisoned: dict[str, object]
) -> None:
    run = tmp_path / "run"
    ranks = crew.start(place.train(run, **poisoned), 2, WORKING_FOLDER=str(tmp_path))
    assert ranks.end() == [7, 7], ranks.logs()
    found = status(run)
    assert (found["state"], found["code"]) == ("failed", 7)
    # The row to blame, and none of the other rank's.
    assert f"samples {tmp_path / 'rows.jsonl'}:61" in found["message"]
    assert found["message"].count("rows.jsonl") == 1


def test_under_shard_the_micro_batch_to_blame_is_dropped(
    place: Any, crew: Any, tmp_path: Path, poisoned: dict[str, object]
) -> None:
    changes = poisoned | {"optimization__on_nonfinite": "skip", "distributed__strategy": "shard"}
    crew.run(place.train(tmp_path / "run", **changes), 2, WORKING_FOLDER=str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    event, *_ = [line for line in lines if line.get("event") == "nonfinite"]
    assert "rows.jsonl:61" in event["samples"]
    assert event["samples"].count("rows.jsonl") == 2


@pytest.mark.parametrize(("changes", "named"), [
    ({"data__path": "rows-{rank}.jsonl"}, "another data than rank 0"),
    ({"cache__disk_size": "1{rank}GB"}, "another configuration: cache.disk_size than rank 0: 11GB, not 10GB"),
])  # fmt: skip
def test_ranks_that_differ_are_refused(
    place: Any, crew: Any, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    rows = (place.folder / "rows.jsonl").read_text()
    (tmp_path / "rows-0.jsonl").write_text(rows)
    (tmp_path / "rows-1.jsonl").write_text(rows.replace("mill", "hill"))
    ranks = crew.start(place.train(tmp_path / "run", **changes), 2, WORKING_FOLDER=str(tmp_path))
    assert ranks.end() == [8, 8], ranks.logs()
    assert f"rank 1 has {named}" in status(tmp_path / "run")["message"]
