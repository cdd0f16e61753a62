"""Going on after a fault: the newest good checkpoint, and restarts of a run that was killed."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llamahome.errors import CheckpointError
from llamahome.files import remove_leftovers
from llamahome.monitor.sinks import JsonlSink
from llamahome.train.checkpoint import TrainingState, load_state, newest_good

logger = logging.getLogger(__name__)
_HOPELESS = (0, 2, 3, 4, 7, 9, 130, 143)


class ResourceRecovery:
    """Brings a run's folder back to its newest good checkpoint.

    `path` is the run folder or one of its checkpoints.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def recover(self) -> Path:
        """Clear half-written files, drop metrics past the checkpoint, return the checkpoint.

        Raises: CheckpointError when no checkpoint is usable.
        """
        checkpoint = newest_good(self.path)
        run = checkpoint.parent
        remove_leftovers(run)
        state, _ = load_state(checkpoint)
        JsonlSink.truncate_after(run / "metrics.jsonl", state.step)
        return checkpoint


def supervise(train: Sequence[str], resume: Sequence[str], run: Path, retries: int) -> int:
    """Run the command `train` in a process of its own; after a crash run `resume`, at most `retries` times.

    Errors that would come again (configuration, data, model, non-finite numbers) end it at once.
    Returns the last exit code.
    """
    command, left = list(train), retries
    while True:
        code = subprocess.run([sys.executable, "-m", "llamahome", *command], check=False).returncode
        code = 128 - code if code < 0 else code
        if code in _HOPELESS or left == 0:
            return code
        left -= 1
        command = list(resume if _has_checkpoint(run) else train)
        logger.warning("the run ended with code %d; %s, %d more tries", code, command[0], left)


def _has_checkpoint(run: Path) -> bool:
    try:
        newest_good(run)
    except CheckpointError:
        return False
    return True


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
