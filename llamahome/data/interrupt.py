"""Signals while data is prepared: there is no step to wait for, so the first one stops the work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from llamahome.errors import Interrupted


class _SignalCame(BaseException):
    """Not an Exception, so that whatever runs lets it through."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block where a handler is set that would only take a note of them.

    Raises: Interrupted.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler) and handler is not signal.default_int_handler:
                before[number] = signal.signal(number, _stop)
    try:
        yield
    except _SignalCame as came:
        what, fix = "stopped by a signal while data was prepared", "run the same command again"
        raise Interrupted(came.number, what=what, fix=fix) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise _SignalCame(number)
