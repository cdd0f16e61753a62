"""What a run folder says about its run, and the figures that follow from it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome.errors import UsageError
from llamahome.memory.monitor import format_bytes
from llamahome.monitor.charts import Point
from llamahome.monitor.sinks import METRICS_FILE
from llamahome.monitor.words import duration


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about its run. `steps` are the records of steps, `events` all else, both in order."""

    name: str
    run: dict[str, Any]
    status: dict[str, Any]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def named(self, event: str) -> list[dict[str, Any]]:
        """The events of that name."""
        return [found for found in self.events if found.get("event") == event]


def read_record(folder: Path) -> RunRecord:
    """Raises: UsageError when `folder` is none of a run. A line that is being written is left out."""
    metrics = folder / METRICS_FILE
    if not metrics.is_file():
        raise UsageError(f"no {METRICS_FILE}", where=str(folder), fix="name the folder of a run")
    records = [record for line in metrics.read_bytes().splitlines() if (record := _json(line))]
    return RunRecord(
        name=folder.resolve().name,
        run=_json_file(folder / "run.json"),
        status=_json_file(folder / "status.json"),
        steps=[record for record in records if "event" not in record and "step" in record],
        events=[record for record in records if "event" in record],
    )


def points(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) of each row that has a number there."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]


def evaluations(record: RunRecord) -> list[Point]:
    """(step, held-out loss), the one before training first."""
    before = dict(points(record.named("evaluation"), "eval_loss"))
    return sorted({**before, **dict(points(record.steps, "eval_loss"))}.items())


def results(record: RunRecord) -> dict[str, str]:
    """The figures by which runs are compared, as texts; those that a run does not have are left out."""
    found = {"state": str(record.status.get("state", "unknown"))}
    if not record.steps:
        return found
    seconds = sum(step.get("step_seconds") or 0.0 for step in record.steps)
    found["steps"] = f"{record.steps[-1]['step']} of {record.run.get('total_steps', '?')} in {duration(seconds)}"
    losses = [value for _, value in evaluations(record)]
    if len(losses) > 1:
        found["held-out loss"] = f"{losses[0]:.4f} before, {losses[-1]:.4f} after"
    tokens = sum(step.get("tokens") or 0 for step in record.steps)
    if tokens and seconds:
        found["real tokens per second"] = f"{tokens / seconds:,.0f}"
        waited = sum(step.get("data_wait_seconds") or 0.0 for step in record.steps)
        found["waiting for data"] = f"{waited / seconds:.2%} of the time"
    peak = max((step.get("memory_peak_bytes") or 0 for step in record.steps), default=0)
    if peak:
        limit = record.run.get("memory_limit_bytes")
        found["peak memory"] = format_bytes(peak) + (f" of {format_bytes(limit)}" if limit else "")
    return found


def typed(record: RunRecord) -> str:
    """The command as it was typed; "" where the run does not say."""
    return shlex.join(map(str, record.run.get("command") or ()))


def reproduce(record: RunRecord) -> str:
    """A command that trains the same again, whatever files and variables the first one read; "" without settings.

    Every setting that is not its default is named; a new folder takes the place of the run's.
    """
    from llamahome.config import Config

    settings = flat(record.run.get("config") or {})
    if not settings:
        return ""
    defaults = flat(Config().to_dict())
    sets = [f"{key}={_value(value)}" for key, value in settings.items() if value != defaults.get(key)
            and key != "training.output"]  # fmt: skip
    words = ["llamahome", "train", "--output", "output/again", *(word for item in sets for word in ("--set", item))]
    return shlex.join(words)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`section.key` to value."""
    return {
        f"{section}.{key}": value
        for section, content in settings.items()
        if isinstance(content, Mapping)
        for key, value in content.items()
    }


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _json(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _json_file(path: Path) -> dict[str, Any]:
    return _json(path.read_bytes()) if path.is_file() else {}
