"""`report.html`: what a run did, on one page that needs nothing else. Two or more runs stand side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from llamahome.files import write_atomic
from llamahome.memory.monitor import format_bytes
from llamahome.monitor.charts import Bars, Chart, Line, bars, svg
from llamahome.monitor.record import RunRecord, evaluations, flat, points, read_record, reproduce, results, typed
from llamahome.monitor.words import clean, event_text

__all__ = ["REPORT_FILE", "RunRecord", "page", "read_record", "write_report"]
REPORT_FILE = "report.html"
_COLOURS = "abcdef"
_EVENTS_SHOWN = 200
_MARKED = ("oom", "cut_changed", "resumed", "signal")
_MARKS = "dashed: cut changed, out of memory, resumed, signal"


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
    ids = [("course", "Training"), *(("compared", "Compared") for _ in records[1:2])]
    ids += [(f"run-{number}", record.name) for number, record in enumerate(records, 1)]
    links = "".join(f'<li><a href="#{name}">{_text(text)}</a></li>' for name, text in ids)
    body = [
        f"<header><h1>{_text(title)}</h1>",
        *(f'<p class="soft">{_text(_summary(record))}</p>' for record in records),
        f'<nav aria-label="On this page"><ul>{links}</ul></nav></header><main>',
        '<section id="course" aria-labelledby="course-title"><h2 id="course-title">Training</h2><div class="charts">',
        *(svg(chart) for chart in _charts(records)),
        "</div></section>",
        *(_compared(records) for _ in records[1:2]),
        *(part for number, record in enumerate(records, 1) for part in _details(record, number)),
        "</main>",
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
    found = results(record)
    words = [f"{record.name}: {found.pop('state')}"]
    if record.status.get("code"):
        words.append(str(record.status.get("message")))
    shown = {"steps": "step", "held-out loss": "held-out loss", "peak memory": "peak memory"}
    return ", ".join([*words, *(f"{name} {found[key]}" for key, name in shown.items() if key in found)])


def _charts(records: Sequence[RunRecord]) -> Iterator[Chart]:
    marks = _marks(records[0]) if len(records) == 1 else []
    losses = [*_series(records, "loss", "loss"), *_evaluation_lines(records)]
    yield Chart("Loss by step", losses, _number)
    yield Chart("Memory: peak of each step, and the limit", _memory_lines(records), format_bytes, marks, _MARKS, True)
    cuts = _series(records, "micro_batch_tokens", "tokens", steps=True)
    yield Chart("The cut: tokens in the largest micro-batch of a step", cuts, _number, marks, _MARKS, True)
    speeds = _series(records, "tokens_per_second", "tokens/s")
    yield Chart("Tokens per second, padding not counted", speeds, _number, from_zero=True)
    waits = _series(records, "data_wait_seconds", "seconds")
    yield Chart("Waiting for data: seconds in each step", waits, _number, from_zero=True)
    yield Chart("Learning rate", _series(records, "learning_rate", "learning rate"), _number, from_zero=True)
    yield Chart("Gradient norm", _series(records, "grad_norm", "gradient norm"), _number, from_zero=True)
    shares = _series(records, "mfu", "share")
    yield Chart("Model FLOPs by what matrix products reached before the run", shares, _share, from_zero=True)


def _series(records: Sequence[RunRecord], key: str, label: str, *, steps: bool = False) -> list[Line]:
    return [
        Line(_label(records, record, label), points(record.steps, key), css, steps)
        for record, css in zip(records, _COLOURS, strict=False)
    ]


def _evaluation_lines(records: Sequence[RunRecord]) -> list[Line]:
    """Held-out losses, in the next colours: beside one run's loss the second, beside two the third and fourth."""
    colours = _COLOURS[len(records) :] or _COLOURS
    return [
        Line(_label(records, record, "held-out loss"), evaluations(record), css)
        for record, css in zip(records, colours, strict=False)
    ]


def _memory_lines(records: Sequence[RunRecord]) -> list[Line]:
    limits = [
        Line(_label(records, record, "limit"), points(record.steps, "memory_limit_bytes"), "limit")
        for record in records
    ]
    return [*_series(records, "memory_peak_bytes", "peak"), *limits]


def _label(records: Sequence[RunRecord], record: RunRecord, label: str) -> str:
    return clean(label if len(records) == 1 else f"{record.name}: {label}")


def _marks(record: RunRecord) -> list[tuple[float, str]]:
    shown = [event for event in record.events if event["event"] in _MARKED and "step" in event]
    return [(event["step"], event_text(event)) for event in shown]


def _compared(records: Sequence[RunRecord]) -> str:
    """A column for each run: results and facts, and those settings in which they differ."""
    measured = _side_by_side([results(record) for record in records])
    facts = _side_by_side([dict(_facts(record)) for record in records])
    settings = _side_by_side([
        {key: json.dumps(value) for key, value in flat(record.run.get("config") or {}).items()} for record in records
    ])  # fmt: skip
    differing = [row for row in settings if len(set(row[1:])) > 1]
    names = [record.name for record in records]
    return (
        '<section id="compared" aria-labelledby="compared-title"><h2 id="compared-title">Compared</h2>'
        f"{_table('Results', measured, names)}{_table('Facts', facts, names)}"
        f"{_table('Settings that differ', differing, names)}</section>"
    )


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, *(column.get(name, "") for column in columns)) for name in names]


def _details(record: RunRecord, number: int) -> Iterator[str]:
    yield f'<section id="run-{number}" aria-labelledby="run-{number}-title">'
    yield f'<h2 id="run-{number}-title">{_text(record.name)}</h2>'
    yield _samples(record)
    yield _block("The command", typed(record))
    yield _block("The same again, from its settings alone", reproduce(record))
    yield _table("Results", list(results(record).items()))
    yield _table("Facts", _facts(record))
    data = record.run.get("data")
    if isinstance(data, dict) and isinstance(data.get("lengths"), dict):
        lengths = sorted((int(length), int(count)) for length, count in data["lengths"].items())
        rows = [(f"up to {length:,}", count) for length, count in lengths]
        yield bars(Bars("Samples by length in tokens", rows, "samples"))
    events = [event_text(event) for event in record.events[-_EVENTS_SHOWN:] if event["event"] != "sample"]
    yield _folded("Events", _list(events)) if events else ""
    settings = json.dumps(record.run.get("config", {}), indent=2, ensure_ascii=False)
    yield _folded("All settings", f'<pre tabindex="0">{_lines(settings)}</pre>')
    yield "</section>"


def _samples(record: RunRecord) -> str:
    """The answer to one prompt before the first step and after the last, and the one in the data."""
    found = record.named("sample")
    if not found:
        return ""
    first, last = found[0], found[-1]
    rows = [("prompt", str(last.get("prompt", ""))), ("before", str(first.get("answer", "")))]
    rows += [("after", str(last.get("answer", "")))] if last is not first else []
    rows += [("in the data", str(last.get("wanted", "")))]
    cells = "".join(f'<tr><th scope="row">{name}</th><td class="said">{_lines(text)}</td></tr>' for name, text in rows)
    return f'<div class="wide"><table><caption>A sample, {_text(str(last.get("place")))}</caption>{cells}</table></div>'


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
    lists = [(name, run[name]) for name in ("versions", "hardware") if isinstance(run.get(name), dict)]
    return rows + [
        (name, ", ".join(f"{key} {value}" for key, value in found.items() if value)) for name, found in lists
    ]


def _table(title: str, rows: Sequence[tuple[str, ...]], columns: Sequence[str] = ()) -> str:
    if not rows:
        return ""
    names = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    head = f"<thead><tr><td></td>{names}</tr></thead>" if columns else ""
    cells = "".join(
        f'<tr><th scope="row">{_text(name)}</th>{"".join(f"<td>{_text(value)}</td>" for value in values)}</tr>'
        for name, *values in rows
    )
    caption = f"<caption>{_text(title)}</caption>" if title else ""
    return f'<div class="wide"><table>{caption}{head}<tbody>{cells}</tbody></table></div>'


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _block(title: str, text: str) -> str:
    return f'<h3>{title}</h3><pre tabindex="0">{_text(text)}</pre>' if text else ""


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _text(text: str) -> str:
    return escape(clean(text))


def _lines(text: str) -> str:
    return escape(clean(text, keep="\n"))
