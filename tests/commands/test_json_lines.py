"""`train --json`: each line of stdout is one object, nothing else is there, and the last one says how it ended."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.cli import main

Lines = list[dict[str, Any]]
SETTINGS = {
    "processing.compile_mode": "none", "processing.precision": "fp32", "processing.threads": 1, "monitor.sinks": "[]",
    "optimization.max_steps": 4, "optimization.global_batch_size": 4, "training.save_steps": 2, "lora.rank": 4,
}  # fmt: skip


@pytest.fixture
def objects(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., tuple[int, Lines]]]:
    """Run a command; its exit code, and the objects on stdout, of which each line must be one."""
    log = logging.getLogger("llamahome")
    before = log.handlers[:], log.level, log.propagate
    monkeypatch.chdir(tmp_path)

    def call(*words: object, **changes: object) -> tuple[int, Lines]:
        sets = [word for key, value in (SETTINGS | changes).items() for word in ("--set", f"{key}={value}")]
        monkeypatch.setattr(sys, "argv", ["llamahome", *map(str, words), "--json", *sets])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    yield call
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture
def words(tiny_model_dir: Path, tmp_path: Path) -> list[object]:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {n} in words.", "completion": "one two three"[: 3 + n % 9]} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["train", data, "--model", tiny_model_dir, "--output", tmp_path / "run"]


def test_a_run_from_its_start_to_its_end_and_on(objects: Any, words: list[object], tmp_path: Path) -> None:
    code, lines = objects(*words)
    assert code == 0
    assert lines[0] == {"event": "start", "step": 0, "total_steps": 4}
    assert [line["step"] for line in lines if "event" not in line] == [1, 2, 3, 4]
    events = [line["event"] for line in lines if "event" in line]
    assert events[-1] == "done"
    assert [events.count(name) for name in ("preflight", "checkpoint", "evaluation", "done")] == [1, 2, 1, 1]
    done = lines[-1]
    assert (done["output"], done["steps"]) == (str(tmp_path / "run"), 4)
    last = [line for line in lines if "event" not in line][-1]
    assert done["after"]["loss"] == last["eval_loss"]

    code, more = objects("train-resume", tmp_path / "run", **{"optimization.max_steps": 6})
    assert code == 0
    assert [line["step"] for line in more if "event" not in line] == [5, 6]
    assert (more[0]["step"], more[-1]["event"], more[-1]["steps"]) == (4, "done", 6)


def test_the_lines_are_those_of_metrics_jsonl(objects: Any, words: list[object], tmp_path: Path) -> None:
    _, lines = objects(*words, **{"optimization.max_steps": 2})
    kept = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1:-1] == kept


def test_a_dry_run_is_one_object_and_leaves_nothing(objects: Any, words: list[object], tmp_path: Path) -> None:
    code, lines = objects(*words, "--dry-run")
    assert code == 0
    assert [line["event"] for line in lines] == ["preflight"]
    assert not (tmp_path / "run").exists()


def test_a_failed_run_prints_no_done(objects: Any, words: list[object], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    assert objects(*words) == (3, [])
