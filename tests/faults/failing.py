"""Work in a child process whose Nth change to the file system is its last, or fails; needs shim.c preloaded."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from llamahome.errors import LlamaHomeError

Say = Callable[[bytes], object]
Work = Callable[[Path, Say], None]
Judge = Callable[[Path, bytes, int], Iterable[str]]

shim = ctypes.CDLL(None)


def child(work: Work, folder: Path, nth: int, error: int) -> tuple[int, bytes, int]:
    """Work up to the nth call: exit code (minus the signal), what the work said until then, calls in all."""
    reader, writer = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 0
        shim.arm(nth, error)
        try:
            work(folder, writer.send)
        except LlamaHomeError as failed:
            code = failed.exit_code
        except BaseException:
            traceback.print_exc()
            code = 99
        writer.send(b"\0" + str(shim.counted()).encode())
        os._exit(code)
    writer.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with reader:
        said, _, calls = reader.makefile("rb").read().partition(b"\0")
    return status, said, int(calls or 0)


def at_every_call(folder: Path, error: int, template: Path, work: Work, judge: Judge) -> dict[str, object]:
    """The number of calls, and the faults found: for each call, in a copy of `template`, the work is stopped or fails
    there, and `judge(copy, said, status)` looks at what it left."""
    status, _, calls = child(work, Path(shutil.copytree(template, folder / "whole")), 0, 0)
    faults = [] if status == 0 else [f"without a fault: {status}"]
    allowed = (0, 6) if error else (-signal.SIGKILL,)
    for nth in range(1, calls + 1):
        copy = Path(shutil.copytree(template, folder / str(nth)))
        status, said, _ = child(work, copy, nth, error)
        found = [] if status in allowed else [f"ended with {status}"]
        faults += [f"call {nth}: {fault}" for fault in (*found, *judge(copy, said, status))]
        shutil.rmtree(copy)
    return {"calls": calls, "faults": faults}
