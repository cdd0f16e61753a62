"""How far a preparation is: rates, the share that is done, the time left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from llamahome.memory.monitor import format_bytes
from llamahome.monitor.words import bar, duration

logger = logging.getLogger(__name__)

_LINE_SECONDS = 10.0
_REDRAW_SECONDS = 0.2


@dataclass
class Progress:
    """Bytes of input in all, done by earlier runs, and done in all; rows and tokens of this run."""

    total_bytes: int
    earlier_bytes: int = 0
    done_bytes: float = 0
    rows: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def share(self) -> float:
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0

    def line(self) -> str:
        """`37% of 4.2 GB, 12,345 rows/s, 2,345,678 tokens/s, 0:12:34 left`."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        parts = [
            f"{self.share:.0%} of {format_bytes(self.total_bytes)}",
            f"{self.rows / seconds:,.0f} rows/s",
            f"{self.tokens / seconds:,.0f} tokens/s",
        ]
        done = self.done_bytes - self.earlier_bytes
        if done > 0:
            parts.append(f"{duration(seconds * max(0.0, self.total_bytes - self.done_bytes) / done)} left")
        return ", ".join(parts)


Show = Callable[[Progress], None]


def log_progress() -> Show:
    """One log line every ten seconds."""
    told = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= _LINE_SECONDS:
            told = time.monotonic()
            logger.info("%s", progress.line())

    return show


@contextmanager
def progress_view() -> Iterator[Show]:
    """A line that redraws itself where stderr is a terminal, else log lines."""
    if not sys.stderr.isatty():
        yield log_progress()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    drawn = float("-inf")
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:

        def show(progress: Progress) -> None:
            nonlocal drawn
            if time.monotonic() - drawn >= _REDRAW_SECONDS:
                drawn = time.monotonic()
                live.update(Text(f"{bar(progress.share)} {progress.line()}"), refresh=True)

        yield show
