"""Signals: the first asks the run to save and stop, the second stops it at once, SIGUSR1 asks for a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """Watches SIGINT, SIGTERM and SIGUSR1 while the `with` block runs; handlers are put back afterwards.

    `stop` holds the signal's number once one came; `save` is true after SIGUSR1 until it is set back.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Only the main thread may set handlers; a library user's other threads keep theirs.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif self.stop is None:
            self.stop = number
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
