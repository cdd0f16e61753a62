"""`--nproc N`: torchrun on this host, which ends with the ranks' own exit code; torchrun itself hides it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from llamahome.commands.options import print_error
from llamahome.errors import DistributedError
from llamahome.files import read_json, write_json

_DOCUMENTED = {2, 3, 4, 5, 6, 7, 9}
_ENDS = ("done", "stopped", "failed")
STATUS_FILE = "status.json"


def without_option(words: Sequence[str], name: str) -> list[str]:
    """The command's words without the option `name` and its value."""
    kept, skip = [], False
    for word in words:
        if not (skip or word == name or word.startswith(f"{name}=")):
            kept.append(word)
        skip = not skip and word == name
    return kept


def launch(words: Sequence[str], ranks: int, run: Path, *, restarts: int, timeout: float) -> int:
    """Run the command `words` as so many processes of a run in the folder `run`; returns the documented exit code.

    A group that loses a rank is started again from its newest checkpoint, at most `restarts` times. SIGINT and SIGTERM
    reach every rank and SIGUSR1 rank 0, which saves with all. `timeout` is the watchdog's, in seconds.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks set their threads themselves; torchrun warns without it
    options = [
        "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}",
        "--monitor-interval=0.1", f"--shutdown-timeout={int(timeout) + 60}", "--module", "llamahome", *words,
    ]  # fmt: skip
    began, codes, stopped = time.time(), dict[int, int](), 0
    with _forwarded(run, signal.SIGUSR1):
        try:
            torchrun(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except SignalException as error:
            stopped = int(error.sigval)
    return _code(run, began, codes, stopped)


def _code(run: Path, began: float, codes: Mapping[int, int], stopped: int) -> int:
    """What status.json says if this run wrote it; else what the ranks' codes say, and status.json is put right."""
    status = read_json(run / STATUS_FILE)
    ours = _written_at(status) >= int(began)
    if ours and status.get("state") in _ENDS:
        return int(status["code"])
    if stopped:
        code, message = 128 + stopped, "stopped by a signal"
    elif known := _DOCUMENTED.intersection(codes.values()):
        return min(known)  # a fault before the run's folder was opened; the rank has said it
    elif 1 in codes.values():
        code, message = 1, "a rank ended with an unexpected error"
    elif not codes:
        return 0
    else:
        code, message = DistributedError.exit_code, "; ".join(_ended(rank, code) for rank, code in codes.items())
    if ours:
        resumable = any(run.glob("checkpoint-*"))
        write_json(run / STATUS_FILE, {**status, "state": "failed", "code": code, "message": message,
                                       "resumable": resumable})  # fmt: skip
    print_error(f"error: {message}; {run}; continue with train-resume")
    return code


def _ended(rank: int, code: int) -> str:
    if code >= 0:
        return f"rank {rank} ended with code {code}"
    return f"rank {rank} was killed by {signal.Signals(-code).name}"


@contextmanager
def _forwarded(run: Path, number: signal.Signals) -> Iterator[None]:
    """Pass a signal on to rank 0 of the run while the block runs."""

    def forward(_number: int, _frame: FrameType | None) -> None:
        status = read_json(run / STATUS_FILE)
        if status.get("state") == "running":
            os.kill(int(status["pid"]), number)

    before = signal.signal(number, forward)
    try:
        yield
    finally:
        signal.signal(number, before)


def _written_at(status: Mapping[str, Any]) -> float:
    try:
        return datetime.strptime(str(status.get("time")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


def tell_torchrun(error: BaseException) -> None:
    """Leave the error where torchrun looks for the first cause, as its `record` does; the exit code stays ours."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        get_error_handler().record_exception(error)
    except OSError as fault:
        print_error(f"torchrun is not told: {fault}")
