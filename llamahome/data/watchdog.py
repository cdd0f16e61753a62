"""A time limit for Python code that others wrote: chat templates and format plugins."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.2


class TimeLimit(BaseException):
    """Raised inside code that runs for too long. Not an Exception, so that the code's own handlers let it through."""


class Watchdog:
    """Calls functions with a time limit each; use it as a context manager around many calls.

    The limit acts between two bytecodes: Python code that loops is stopped, a blocking system call is not.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._call: tuple[int, float] | None = None  # thread and deadline of the running call
        self._fired = False
        self._thread = threading.Thread(target=self._watch, name="llamahome-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def run(self, work: Callable[[], T]) -> T:
        """Return `work()`. Raises: TimeLimit after `seconds`."""
        self._call = threading.get_ident(), time.monotonic() + self.seconds
        try:
            return work()
        finally:
            with self._lock:
                self._call = None
                if self._fired:  # it may not have arrived yet
                    self._fired = False
                    _raise_in(threading.get_ident(), None)

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            with self._lock:
                if self._call is None or time.monotonic() < self._call[1]:
                    continue
                thread, self._call, self._fired = self._call[0], None, True
                _raise_in(thread, TimeLimit)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in another thread at its next bytecode; None takes back one that has not arrived."""
    value = ctypes.py_object(error) if error else ctypes.py_object()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)
