"""Figures, events and evaluations as one clean line of text for a person."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WORDS_SHOWN = 100  # characters of one value of an event
_BAR = 24
BLOCKS = "▁▂▃▄▅▆▇█"
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
# Line ends beyond ASCII, marks that turn the direction of text around, and halves of characters that cannot be written.
_ESCAPES |= {
    code: f"\\u{code:04x}" for code in (*range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
}
Record = Mapping[str, Any]
# What an event says. One without these fields, or of another name, is told field by field.
_SAID = {
    "preflight": "checked in {seconds:.0f} s, longest sample {longest_tokens:,} tokens, about {seconds_left} to go",
    "calibrated": "{tokens:,} tokens tried, {predicted} planned and {measured} measured",
    "cut_changed": "at most {to:,} tokens in a micro-batch, {from:,} before: {reason}",
    "oom": "out of memory with {tokens:,} tokens in a micro-batch: {error}",
    "checkpoint": "saved {path}",
    "resumed": "resumed from {checkpoint}",
    "rewind": "back from step {from_step}: {fault}, samples {samples}",
    "nonfinite": "dropped: {fault}, samples {samples}",
    "signal": "stopped by signal {signal}",
    "early_stop": "no longer better than {best}: stopped",
    "threshold": "{resource} {share:.0%} in use, the threshold is {threshold:.0%}",
    "sample": '{place} answered: "{answer}"',
}


def event_text(event: Record) -> str:
    """An event in one clean line, its step first."""
    name = str(event.get("event", "event"))
    if name == "evaluation":
        return evaluation_text(event)
    values = {
        key: _for_person(key, value)
        for key, value in event.items()
        if key not in ("event", "step") and value is not None
    }
    try:
        said = _SAID[name].format_map(values)
    except (KeyError, ValueError):  # of another version, or of a callback
        told = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        said = f"{name}: {told}" if told else name
    return clean(said if event.get("step") is None else f"step {event['step']}: {said}")


def evaluation_text(record: Record) -> str:
    """The figures of an evaluation in one clean line."""
    where = f"step {record['step']}: held-out " if "step" in record else "held-out "
    names = [name for name in record if str(name).startswith("eval_")]
    told = (f"{name.removeprefix('eval_').replace('_', ' ')} {_short(record[name])}" for name in names)
    return clean(where + ", ".join(told))


def program() -> str:
    """What to type for `llamahome`: its path where the shell would not find it, as after `make train`."""
    typed = sys.argv[0]
    return typed if Path(typed).name == "llamahome" and shutil.which("llamahome") is None else "llamahome"


def short_path(path: Path) -> str:
    """A path below the working folder without that folder, any other one whole."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def memory_text(used: float, limit: float | None) -> str:
    return f"{used / 1e9:.2f} GB" if not limit else f"{used / 1e9:.2f}/{limit / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """H:MM:SS."""
    whole = round(max(0.0, seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def bar(share: float, width: int = _BAR) -> str:
    filled = round(width * min(1.0, max(0.0, share)))
    return f"[{'#' * filled}{'.' * (width - filled)}]"


def sparkline(values: Sequence[float]) -> str:
    """A curve of one line: the lowest value is the lowest block."""
    low, high = min(values), max(values)
    return "".join(BLOCKS[round((value - low) / ((high - low) or 1.0) * (len(BLOCKS) - 1))] for value in values)


def clean(text: str, keep: str = "") -> str:
    """`text` without control characters other than those to `keep`, so that data cannot steer the terminal."""
    return text.translate({code: shown for code, shown in _ESCAPES.items() if chr(code) not in keep})


def _for_person(key: str, value: Any) -> Any:
    """Bytes and seconds as texts, by the value's name; long texts cut; numbers as they are."""
    if isinstance(value, int | float):
        if key.endswith("_bytes") or key in ("predicted", "measured"):
            return memory_text(value, None)
        return duration(value) if key == "seconds_left" else value
    text = str(value)
    return text if len(text) <= _WORDS_SHOWN else f"{text[:_WORDS_SHOWN]} ..."


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
