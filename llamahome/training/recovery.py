"""Going on after a fault: the newest good checkpoint, and restarts of a run that was killed."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from llamahome.errors import CheckpointError, LlamaHomeError
from llamahome.files import read_json, remove_folder, storage_errors
from llamahome.memory.agree import keep_smaller_budget
from llamahome.memory.cgroup import oom_kills
from llamahome.monitor.sinks import METRICS_FILE, JsonlSink
from llamahome.training.checkpoint import TrainingState, load_state, newest_good, restore, set_aside_after
from llamahome.training.loop import TrainingLoop
from llamahome.training.rundir import STATUS_FILE, read_run

logger = logging.getLogger(__name__)
_HOPELESS = (0, 2, 3, 4, 5, 7, 9, 130, 143)


class ResourceRecovery:
    """Brings a run's folder back to `checkpoint`, the newest good one of `path` (a run folder or a checkpoint in it).

    Only for the holder of the run's lock. Raises: CheckpointError when no checkpoint is usable.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoint = newest_good(path)
        self.step = load_state(self.checkpoint)[0].step

    def recover(self) -> Path:
        """Set later checkpoints aside, drop metrics past the checkpoint, return it. Raises: StorageError."""
        set_aside_after(self.checkpoint)
        JsonlSink.truncate_after(self.checkpoint.parent / METRICS_FILE, self.step)
        return self.checkpoint


def supervise(train: Sequence[str], resume: Sequence[str], run: Path, retries: int) -> int:
    """Run the command `train` in a process of its own; after a crash run `resume`, at most `retries` times.

    Errors that would come again (configuration, data, model, memory limit, non-finite numbers) end it at once, and so
    does a signal, which is passed on. After a kill by the kernel for want of memory the next try cuts steps smaller.
    Returns the last exit code.
    """
    command = list(train)
    for left in reversed(range(retries + 1)):
        kills = oom_kills()
        code, pid, signalled = _run([sys.executable, "-m", "llamahome", *command])
        if code in _HOPELESS or signalled or left == 0:
            break
        if code == 128 + signal.SIGKILL and oom_kills() > kills:
            _cut_smaller(run)
        if _has_checkpoint(run):
            command = list(resume)
        else:
            _clear(run, pid)
        logger.warning("the run ended with code %d; %s again, %d more tries", code, command[0], left - 1)
    return code


def _run(command: Sequence[str]) -> tuple[int, int, bool]:
    """Exit code (128 + signal number of a killed process), process id, and whether a signal came for us meanwhile."""
    came: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        process.send_signal(number)

    # In a group of its own: a terminal's Ctrl-C must not reach it twice, since the second leaves at once.
    process = subprocess.Popen(command, process_group=0)
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (128 - code if code < 0 else code), process.pid, bool({signal.SIGINT, signal.SIGTERM}.intersection(came))


def _cut_smaller(run: Path) -> None:
    """Halve the cut that the killed process began with, for the next one."""
    try:
        tokens = int(read_run(run)["memory_plan"]["micro_batch_tokens"])
    except (LlamaHomeError, KeyError, TypeError, ValueError):
        return  # killed before its plan was written: nothing to halve
    logger.warning("the kernel killed it for want of memory: at most %d tokens in a micro-batch from now on",
                   keep_smaller_budget(run, tokens))  # fmt: skip


def _has_checkpoint(run: Path) -> bool:
    try:
        newest_good(run)
    except CheckpointError:
        return False
    return True


def _clear(run: Path, pid: int) -> None:
    """Let `train` begin again in the folder of a run that left no checkpoint: its `best` would be in the way."""
    if read_json(run / STATUS_FILE).get("pid") == pid:
        with storage_errors(run):
            remove_folder(run / "best")


def rewind(run: Path, loop: TrainingLoop) -> None:
    """Bring `loop` back to the run's newest good checkpoint: weights, optimizer, schedule, random state, position.

    Raises: CheckpointError when there is none.
    """
    found = newest_good(run)
    state, rest = load_state(found)
    loop.optimizer.zero_grad(set_to_none=True)
    loop.optimizer.state.clear()  # at step 0 it had none
    restore(found, rest, loop.model, loop.optimizer, loop.scheduler, loop.scaler)
    loop.go_back(state)


def resumed_state(checkpoint: Path, data_fingerprint: str, model_fingerprint: str) -> TrainingState:
    """The checkpoint's state, after it was compared with the data and model at hand.

    Raises: CheckpointError naming what differs.
    """
    state, _ = load_state(checkpoint)
    for what, stored, found, fix in (
        ("data", state.data_fingerprint, data_fingerprint, "put the run's data back, or start a new run"),
        ("model", state.model_fingerprint, model_fingerprint, "name the run's model, or start a new run"),
    ):
        if stored != found:
            raise CheckpointError(f"the {what} is not the run's: {found[:12]}, not {stored[:12]}",
                                  where=str(checkpoint), fix=fix)  # fmt: skip
    return state
