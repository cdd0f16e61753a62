"""Work in processes forked from one that has everything loaded, killed at a random moment or file operation."""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.utime"}


@dataclass(frozen=True)
class Moment:
    """When a process is killed: after some seconds, or at the nth file operation below a folder; never by default."""

    seconds: float | None = None
    operation: int = 0
    below: Path = Path()

    @classmethod
    def draw(cls, chance: random.Random, *, longest: float, operations: int, below: Path) -> Moment:
        """One or the other, evenly spread over `longest` seconds or that many operations."""
        if chance.random() < 0.5:
            return cls(seconds=chance.uniform(0, longest))
        return cls(operation=chance.randrange(1, operations), below=below)


def attempt(work: Callable[[], object], moment: Moment) -> bool:
    """Do the work in a forked process; whether it got to its end before the kill.

    Raises: AssertionError when the work fails by itself.
    """
    child = os.fork()
    if child == 0:
        _do(work, moment)
    if moment.seconds is not None:
        watched = os.pidfd_open(child)
        select.select([watched], [], [], moment.seconds)
        os.close(watched)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"ended with {code}"
    return code == 0


def _do(work: Callable[[], object], moment: Moment) -> NoReturn:
    if moment.operation:
        _kill_at(moment)
    try:
        work()
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)


def _kill_at(moment: Moment) -> None:
    count, below = 0, str(moment.below)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and below in str(arguments[0]):
            count += 1
            if count == moment.operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
