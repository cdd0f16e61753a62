"""What a person sees while a run goes on: a live view on a terminal, plain lines anywhere else."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Protocol, TextIO

from llamahome.monitor.words import (
    BLOCKS,
    Record,
    bar,
    clean,
    duration,
    evaluation_text,
    event_text,
    memory_text,
    sparkline,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_REDRAW_SECONDS = 0.2
_EVENTS_SHOWN = 4
_LOSSES_SHOWN = 48


class Progress(Protocol):
    """Shows a run. Never raises and never stops the run, whatever happens to the output."""

    def start(self, total_steps: int, step: int = 0) -> None: ...
    def step(self, record: Record) -> None: ...
    def event(self, event: Record) -> None: ...
    def evaluation(self, record: Record) -> None: ...
    def finish(self, summary: str = "") -> None: ...


def build_progress(
    interval: int = 10, stream: TextIO | None = None, console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:  # fmt: skip
    """A live view where `stream` (stdout by default) is a terminal that can redraw, else plain lines.

    `interval`: steps between two plain lines.
    """
    stream = stream or sys.stdout
    dumb = os.environ.get("TERM", "dumb") in ("", "dumb")
    if console is None and (stream is None or not _is_terminal(stream) or dumb):
        return PlainProgress(interval, stream, clock)
    return LiveProgress(console or _console(stream), clock)


class Pace:
    """Steps done and seconds left, at the mean pace of the last steps."""

    def __init__(self, total_steps: int, step: int, clock: Callable[[], float]) -> None:
        self.total_steps, self.step = total_steps, step
        self._clock = clock
        self._marks = deque([(step, clock())], maxlen=21)

    def advance(self, step: int) -> None:
        self.step = step
        self._marks.append((step, self._clock()))

    @property
    def seconds_left(self) -> float | None:
        (first, began), (last, now) = self._marks[0], self._marks[-1]
        return (self.total_steps - self.step) * (now - began) / (last - first) if last > first else None


class PlainProgress:
    """One line of plain ASCII per `interval` steps, one per event and evaluation."""

    def __init__(self, interval: int, stream: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval = interval
        self._stream, self._clock = stream, clock
        self._pace = Pace(0, 0, clock)

    def start(self, total_steps: int, step: int = 0) -> None:
        self._pace = Pace(total_steps, step, self._clock)
        self._print(f"training {total_steps - step} steps" + (f", from step {step}" if step else ""))

    def step(self, record: Record) -> None:
        step = int(record["step"])
        self._pace.advance(step)
        if step % self.interval == 0 or step == self._pace.total_steps:
            self._print(", ".join([f"step {step}/{self._pace.total_steps}", *step_parts(record, self._pace)]))

    def event(self, event: Record) -> None:
        self._print(event_text(event))

    def evaluation(self, record: Record) -> None:
        self._print(evaluation_text(record))

    def finish(self, summary: str = "") -> None:
        if summary:
            self._print(clean(summary))

    def _print(self, line: str) -> None:
        self._stream = _write_line(self._stream, line)


class JsonProgress:
    """One JSON object per step and event in a line of its own, with the fields of metrics.jsonl."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def start(self, total_steps: int, step: int = 0) -> None:
        self._print({"event": "start", "step": step, "total_steps": total_steps})

    def step(self, record: Record) -> None:
        self._print(record)

    def event(self, event: Record) -> None:
        self._print(event)

    def evaluation(self, record: Record) -> None:
        if "event" in record:  # else it has come with its step
            self._print(record)

    def finish(self, summary: str = "") -> None:
        return

    def _print(self, record: Record) -> None:
        from llamahome.monitor.sinks import plain

        self._stream = _write_line(self._stream, json.dumps(plain(record)))


class LiveProgress:
    """A view that redraws in place, from inside of the calls: no thread, five times a second at most."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        self._console, self._clock = console, clock
        self._live: Live | None = Live(console=console, auto_refresh=False, transient=False)
        self._pace = Pace(0, 0, clock)
        self._record: Record = {}
        self._evaluation: Record = {}
        self._events: deque[str] = deque(maxlen=_EVENTS_SHOWN)
        self._losses: deque[float] = deque(maxlen=_LOSSES_SHOWN)
        self._drawn_at = float("-inf")

    def start(self, total_steps: int, step: int = 0) -> None:
        self._pace = Pace(total_steps, step, self._clock)
        self._guarded(lambda live: live.start())
        self._draw(now=True)

    def step(self, record: Record) -> None:
        self._record = dict(record)
        if isinstance(loss := record.get("loss"), float) and math.isfinite(loss):
            self._losses.append(loss)
        self._pace.advance(int(record["step"]))
        self._draw(now=self._pace.step == self._pace.total_steps)

    def event(self, event: Record) -> None:
        self._events.append(_encodable(event_text(event), self._console.file))
        self._draw(now=True)

    def evaluation(self, record: Record) -> None:
        self._evaluation = dict(record)
        self._draw(now=True)

    def finish(self, summary: str = "") -> None:
        if summary:
            self._events.append(_encodable(clean(summary), self._console.file))
        self._draw(now=True)
        self._guarded(lambda live: live.stop())
        self._live = None

    def _draw(self, now: bool) -> None:
        time_now = self._clock()
        if now or time_now - self._drawn_at >= _REDRAW_SECONDS:
            self._drawn_at = time_now
            self._guarded(lambda live: live.update(self._view(), refresh=True))

    def _guarded(self, action: Callable[[Any], None]) -> None:
        if self._live is None:
            return
        try:
            action(self._live)
        except (OSError, ValueError, SystemExit):  # rich leaves the program when its reader has gone
            self._live = None
            _silence(self._console.file)

    def _view(self) -> RenderableType:
        """Built of Text objects only, so that nothing in them is read as markup."""
        from rich.console import Group
        from rich.text import Text

        total, step = self._pace.total_steps, self._pace.step
        lines = [Text(f"{bar(step / max(1, total))} step {step}/{total}", style="bold")]
        if self._record:
            lines.append(Text("  ".join(step_parts(self._record, self._pace, memory=False))))
            used, limit = self._record.get("memory_peak_bytes"), self._record.get("memory_limit_bytes")
            if used is not None and limit:
                style = "red" if used > limit else "yellow" if used > 0.9 * limit else "green"
                lines.append(Text(f"{bar(used / limit)} memory {memory_text(used, limit)}", style=style))
        if len(self._losses) > 1 and _draws(self._console.file):
            curve = f"{sparkline(self._losses)} loss of the last {len(self._losses)} steps"
            lines.append(Text(f"{curve}, {self._losses[0]:.3f} to {self._losses[-1]:.3f}", style="blue"))
        if self._evaluation:
            lines.append(Text(evaluation_text(self._evaluation), style="cyan"))
        return Group(*lines, *(Text(event, style="dim") for event in self._events))


def step_parts(record: Record, pace: Pace, memory: bool = True) -> list[str]:
    """The figures of a step as short texts; those that are None are left out."""
    used, limit, left = record.get("memory_peak_bytes"), record.get("memory_limit_bytes"), pace.seconds_left
    parts = (
        ("loss {:.4f}", record.get("loss")),
        ("lr {:.3g}", record.get("learning_rate")),
        ("{:,.0f} tokens/s", record.get("tokens_per_second")),
        ("memory {}", memory_text(used, limit) if memory and used is not None else None),
        ("{} left", None if left is None else duration(left)),
    )
    return [template.format(value) for template, value in parts if value is not None]


def _draws(stream: IO[str]) -> bool:
    """Whether the stream's encoding has the blocks."""
    return _encodable(BLOCKS, stream) == BLOCKS


def _write_line(stream: TextIO | None, line: str) -> TextIO | None:
    """Write and flush; returns the stream, or None when nobody reads it any more."""
    if stream is None:
        return None
    try:
        stream.write(_encodable(line, stream) + "\n")
        stream.flush()
    except (OSError, ValueError):  # the reader has gone, the disk is full, or the stream is closed
        _silence(stream)
        return None
    return stream


def _encodable(line: str, stream: IO[str]) -> str:
    """What the stream's encoding lacks becomes a question mark."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (ValueError, AttributeError):  # closed, or no real stream
        return False


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, emoji=False)


def _silence(stream: Any) -> None:
    """Point a broken stdout at nothing, or Python complains again when it flushes at exit."""
    if stream is not sys.stdout:
        return
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
    except (OSError, ValueError, io.UnsupportedOperation):
        return
