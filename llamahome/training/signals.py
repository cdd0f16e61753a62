"""Signals: the first asks the run to save and stop, the second stops it at once, SIGUSR1 asks for a checkpoint."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from llamahome.distributed.ranks import Ranks


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


@dataclass(frozen=True)
class Asked:
    """What all ranks do after a step, because a signal or a callback of one of them asks for it."""

    stop: int | None
    save: bool
    wish: bool

    @property
    def ends(self) -> bool:
        return self.stop is not None or self.wish


def agree(ranks: Ranks, signals: StopSignal, wish: bool = False) -> Asked:
    """What the signals of all ranks, and any rank's wish to stop, ask for; the same answer on each.

    `signals` stays as it is. What comes while the ranks ask each other is there the next time; and the signal that
    torchrun sends to each rank is the first for each, though another rank's was obeyed already.
    """
    stop, save, wishes = ranks.largest([float(signals.stop or 0), float(signals.save), float(wish)])
    return Asked(int(stop) or None, bool(save), bool(wishes))
