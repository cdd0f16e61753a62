"""`report.html`: what a run did, on one page that needs nothing else. Two or more runs are drawn into one picture."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from llamahome.errors import UsageError
from llamahome.files import write_atomic
from llamahome.memory.monitor import format_bytes
from llamahome.monitor.charts import Chart, Line, Point, svg
from llamahome.monitor.progress import clean, duration
from llamahome.monitor.sinks import METRICS_FILE

REPORT_FILE = "report.html"
_COLOURS = "abcdef"
_EVENTS_SHOWN = 200
_MARKED = ("oom", "cut_changed", "resumed", "signal")


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about its run. `steps` are the records of steps, `events` all else, both in order."""

    name: str
    run: dict[str, Any]
    status: dict[str, Any]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]


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


def write_report(folders: Sequence[Path], path: Path | None = None) -> Path:
    """Write the page about the runs in `folders` to `path`, by default into the first folder; returns where.

    Raises: UsageError, StorageError.
    """
    path = path or folders[0] / REPORT_FILE
    write_atomic(path, page([read_record(folder) for folder in folders]))
    return path


def page(records: Sequence[RunRecord]) -> str:
    """The whole page. All text from runs is escaped and cleaned of control characters."""
    title = " and ".join(record.name for record in records)
    body = [
        f"<h1>{_text(title)}</h1>",
        *(f'<p class="soft">{_text(_summary(record))}</p>' for record in records),
        "<h2>Course</h2><main>",
        *(svg(chart) for chart in _charts(records)),
        "</main>",
        *(part for record in records for part in _details(record)),
    ]
    head = f"<title>{_text(title)} - LlamaHome</title><style>{_style()}</style>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"{head}</head><body>{''.join(body)}</body></html>\n"
    )


def _style() -> str:
    return files("llamahome.monitor").joinpath("report.css").read_text(encoding="utf-8")


def _summary(record: RunRecord) -> str:
    words = [f"{record.name}: {record.status.get('state', 'unknown')}"]
    if record.status.get("code"):
        words.append(str(record.status.get("message")))
    if record.steps:
        seconds = sum(step.get("step_seconds") or 0.0 for step in record.steps)
        words.append(f"step {record.steps[-1]['step']} of {record.run.get('total_steps', '?')} in {duration(seconds)}")
    losses = [value for _, value in _evaluations(record)]
    if len(losses) > 1:
        words.append(f"held-out loss {losses[0]:.4f} before, {losses[-1]:.4f} after")
    peak = max((step.get("memory_peak_bytes") or 0 for step in record.steps), default=0)
    if peak:
        limit = record.run.get("memory_limit_bytes")
        words.append(f"peak memory {format_bytes(peak)}" + (f" of {format_bytes(limit)}" if limit else ""))
    return ", ".join(words)


def _charts(records: Sequence[RunRecord]) -> Iterator[Chart]:
    marks = _marks(records[0]) if len(records) == 1 else []
    losses = [*_series(records, "loss", "loss"), *_evaluation_lines(records)]
    yield Chart("Loss by step", losses, _number)
    yield Chart("Memory: peak of each step, and the limit", _memory_lines(records), format_bytes, marks, from_zero=True)
    cuts = _series(records, "micro_batch_tokens", "tokens of the largest micro-batch", steps=True)
    yield Chart("The cut", cuts, _number, marks, from_zero=True)
    yield Chart("Real tokens per second", _series(records, "tokens_per_second", "tokens/s"), _number, from_zero=True)
    waits = _series(records, "data_wait_seconds", "waiting for data, seconds a step")
    yield Chart("Waiting for data", waits, _number, from_zero=True)
    yield Chart("Learning rate", _series(records, "learning_rate", "learning rate"), _number, from_zero=True)
    yield Chart("Gradient norm", _series(records, "grad_norm", "gradient norm"), _number, from_zero=True)
    yield Chart("Model FLOP utilisation", _series(records, "mfu", "share of the peak"), _share, from_zero=True)


def _series(records: Sequence[RunRecord], key: str, label: str, *, steps: bool = False) -> list[Line]:
    return [
        Line(_label(records, record, label), _points(record.steps, key), css, steps)
        for record, css in zip(records, _COLOURS, strict=False)
    ]


def _evaluation_lines(records: Sequence[RunRecord]) -> list[Line]:
    """Held-out losses, in the next colours: beside one run's loss the second, beside two the third and fourth."""
    colours = _COLOURS[len(records) :] or _COLOURS
    return [
        Line(_label(records, record, "held-out loss"), _evaluations(record), css)
        for record, css in zip(records, colours, strict=False)
    ]


def _memory_lines(records: Sequence[RunRecord]) -> list[Line]:
    limits = [
        Line(_label(records, record, "limit"), _points(record.steps, "memory_limit_bytes"), "limit")
        for record in records
    ]
    return [*_series(records, "memory_peak_bytes", "peak"), *limits]


def _label(records: Sequence[RunRecord], record: RunRecord, label: str) -> str:
    return clean(label if len(records) == 1 else f"{record.name}: {label}")


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _evaluations(record: RunRecord) -> list[Point]:
    before = [event for event in record.events if event.get("event") == "evaluation"]
    return sorted({**dict(_points(before, "eval_loss")), **dict(_points(record.steps, "eval_loss"))}.items())


def _marks(record: RunRecord) -> list[tuple[float, str]]:
    shown = [event for event in record.events if event["event"] in _MARKED and "step" in event]
    return [(event["step"], clean(_event_text(event))) for event in shown]


def _details(record: RunRecord) -> Iterator[str]:
    yield f"<h2>{_text(record.name)}</h2>"
    if command := record.run.get("command"):
        yield f'<p>The command:</p><pre tabindex="0">{_text(shlex.join(map(str, command)))}</pre>'
    yield _table("Facts", _facts(record))
    data = record.run.get("data")
    if isinstance(data, dict) and isinstance(data.get("lengths"), dict):
        rows = [(f"up to {length} tokens", f"{count:,}") for length, count in data["lengths"].items()]
        yield _table("Samples by length", rows)
    yield _table("Events", [(f"step {e.get('step', '?')}", _event_text(e)) for e in record.events[-_EVENTS_SHOWN:]])
    settings = json.dumps(record.run.get("config", {}), indent=2, ensure_ascii=False)
    yield f'<details><summary>All settings</summary><pre tabindex="0">{_lines(settings)}</pre></details>'


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    run = record.run
    keys: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("started", "started", str),
        ("trainable_parameters", "trained parameters", lambda count: f"{count:,}"),
        ("samples_per_step", "samples per step", str),
        ("precision", "precision", str),
        ("device", "device", str),
        ("threads", "threads", str),
        ("attention", "attention", str),
        ("compile_mode", "compile mode", str),
        ("data_fingerprint", "data", str),
        ("model_fingerprint", "model", str),
        ("git_revision", "git revision", str),
    )
    rows = [(name, show(run[key])) for key, name, show in keys if run.get(key) is not None]
    versions = run.get("versions")
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number)))
    return rows


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    cells = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in rows)
    return f'<h3>{_text(title)}</h3><div class="wide"><table>{cells}</table></div>'


def _event_text(event: dict[str, Any]) -> str:
    rest = ", ".join(f"{key} {_plain(value)}" for key, value in event.items() if key not in ("event", "step"))
    return f"{event['event']}: {rest}" if rest else str(event["event"])


def _plain(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _text(text: str) -> str:
    return escape(clean(text))


def _lines(text: str) -> str:
    return escape(clean(text, keep="\n"))


def _json(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _json_file(path: Path) -> dict[str, Any]:
    return _json(path.read_bytes()) if path.is_file() else {}
