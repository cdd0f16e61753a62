"""Charts as inline SVG, each with its figures as a table: no scripts, no fonts, nothing fetched.

Colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

Point = tuple[float, float]
_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 28
_BAR, _LABELS, _COUNTS = 22, 110, 70  # height of a bar's row, widths of its name and its count
_MOST_POINTS = 600  # more than there are pixels helps nobody
_MOST_ROWS = 40  # of the table that stands for the picture


@dataclass(frozen=True)
class Line:
    """Points of rising x. `css` chooses colour and dashes; `steps` holds each value to the next point."""

    label: str
    points: Sequence[Point]
    css: str = "a"
    steps: bool = False


@dataclass(frozen=True)
class Chart:
    """One picture. `marks` are (x, text) of things that happened, and `marked` what they are called together.

    `fmt` writes a value of the y axis.
    """

    title: str
    lines: Sequence[Line]
    fmt: Callable[[float], str]
    marks: Sequence[tuple[float, str]] = field(default=())
    marked: str = ""
    from_zero: bool = False


@dataclass(frozen=True)
class Bars:
    """Counts by their names, drawn in the order given; `unit` says what is counted."""

    title: str
    rows: Sequence[tuple[str, int]]
    unit: str


def svg(chart: Chart) -> str:
    """The chart as a <figure>: picture, legend, and its figures in words and as a table for those who cannot see it."""
    lines = [line for line in chart.lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    frame = _Frame(*_span(xs), *_span([0.0, *ys] if chart.from_zero else ys))
    parts = [*_grid(frame, chart.fmt), *_marks(frame, chart.marks), *(_polyline(frame, line) for line in lines)]
    legend = "".join(f'<span class="key {line.css}">{escape(line.label)}</span>' for line in lines)
    legend += f'<span class="key marked">{escape(chart.marked)}</span>' if chart.marks and chart.marked else ""
    below = f'<p class="legend">{legend}</p>{_line_table(chart, lines)}'
    return _figure(chart.title, _HEIGHT, _in_words(chart, lines), parts, below)


def bars(chart: Bars) -> str:
    """Horizontal bars as a <figure>, each with its count; "" where there is nothing to count."""
    most = max((count for _, count in chart.rows), default=0)
    if not most:
        return ""
    room = _WIDTH - _LABELS - _COUNTS
    parts = []
    for number, (name, count) in enumerate(chart.rows):
        y, length = _TOP + number * _BAR, room * count / most
        parts.append(f'<text x="{_LABELS - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="bar" x="{_LABELS}" y="{y + 3}" width="{length:.1f}" height="{_BAR - 6}"/>')
        parts.append(f'<text x="{_LABELS + length + 6:.1f}" y="{y + 14}">{count:,}</text>')
    words = f"{chart.title}. " + "; ".join(f"{name}: {count:,} {chart.unit}" for name, count in chart.rows)
    return _figure(chart.title, 2 * _TOP + _BAR * len(chart.rows), words, parts, "")


def _figure(title: str, height: int, words: str, parts: Sequence[str], below: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(words)}">{"".join(parts)}</svg>{below}</figure>'
    )


def _line_table(chart: Chart, lines: Sequence[Line]) -> str:
    """The values, at most `_MOST_ROWS` of them evenly spread and the last, behind a summary that opens."""
    xs = sorted({x for line in lines for x, _ in line.points})
    kept = [*xs[:: math.ceil(len(xs) / _MOST_ROWS)], *xs[-1:]]
    columns = [dict(line.points) for line in lines]
    head = "".join(f'<th scope="col">{escape(line.label)}</th>' for line in lines)
    rows = "".join(
        f'<tr><th scope="row">{x:g}</th>'
        + "".join(f"<td>{escape(chart.fmt(column[x])) if x in column else ''}</td>" for column in columns)
        + "</tr>"
        for x in dict.fromkeys(kept)
    )
    return (
        f"<details><summary>Figures: {escape(chart.title)}</summary>"
        f'<table><thead><tr><th scope="col">step</th>{head}</tr></thead><tbody>{rows}</tbody></table></details>'
    )


@dataclass(frozen=True)
class _Frame:
    """Maps values to the picture's coordinates."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (_HEIGHT - _TOP - _BOTTOM)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and largest value, never equal."""
    low, high = min(values), max(values)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - room), high + room


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round values (1, 2 or 5 times a power of ten apart) between low and high."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most about `most` points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _grid(frame: _Frame, fmt: Callable[[float], str]) -> Iterator[str]:
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(fmt(value))}</text>'
    for value in ticks(frame.x0, frame.x1, 8):
        if value == round(value):
            yield f'<text x="{frame.x(value):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{value:.0f}</text>'


def _marks(frame: _Frame, marks: Sequence[tuple[float, str]]) -> Iterator[str]:
    for x, text in marks:
        if frame.x0 <= x <= frame.x1:
            at = f"M{frame.x(x):.1f} {_TOP}V{_HEIGHT - _BOTTOM}"
            yield f'<path class="mark" d="{at}"><title>{escape(text)}</title></path>'


def _polyline(frame: _Frame, line: Line) -> str:
    points = thin(line.points)
    if line.steps:
        points = [corner for before, after in pairwise(points) for corner in (before, (after[0], before[1]))] + [
            points[-1]
        ]
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="dot {line.css}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    return f'<polyline class="line {line.css}" points="{path}"/>'


def _in_words(chart: Chart, lines: Sequence[Line]) -> str:
    def one(line: Line) -> str:
        ys = [y for _, y in line.points]
        first, last, low, high = map(chart.fmt, (ys[0], ys[-1], min(ys), max(ys)))
        return f"{line.label}: from {first} to {last}, lowest {low}, highest {high}"

    return f"{chart.title}. " + "; ".join(one(line) for line in lines)
