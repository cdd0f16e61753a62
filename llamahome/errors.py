"""Errors that a user can cause: one line that says what, where and what to do, and a documented exit code."""

from __future__ import annotations

from signal import SIGINT


class LlamaHomeError(Exception):
    """Base of every expected error.

    `what` states the fault with the value met, `where` names the file, line, field or key, `fix` says what to do.
    Printed as one line, `what; where; fix`, and the process ends with `exit_code`.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        parts = [" ".join(part.split()) for part in (self.what, self.where, self.fix) if part]
        return "; ".join(parts)


class ConfigError(LlamaHomeError):
    """A configuration file, key or value is wrong. May hold several faults, one per line of `faults`."""

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "", faults: tuple[str, ...] = ()) -> None:
        super().__init__(what, where=where, fix=fix)
        self.faults = faults or (str(self),)


class UsageError(LlamaHomeError):
    """The command was given something that it cannot use."""

    exit_code = 2


class DataError(LlamaHomeError):
    """A data file or row is missing, damaged or holds nothing to train on."""

    exit_code = 3


class ModelError(LlamaHomeError):
    """A model, adapter or tokenizer cannot be loaded, or does not match."""

    exit_code = 4


class CheckpointError(LlamaHomeError):
    """A checkpoint is damaged, incomplete or belongs to another run."""

    exit_code = 4


class MemoryLimitError(LlamaHomeError):
    """The work does not fit into the memory that may be used; the message says what would."""

    exit_code = 5


class StorageError(LlamaHomeError):
    """A disk is full, a folder cannot be written, or another run holds it."""

    exit_code = 6


class NonFiniteError(LlamaHomeError):
    """The loss or a gradient is not a finite number."""

    exit_code = 7


class DistributedError(LlamaHomeError):
    """A rank died, hung or differs from the others."""

    exit_code = 8


class MissingError(LlamaHomeError):
    """An optional dependency or the hardware asked for is not there."""

    exit_code = 9


class Interrupted(LlamaHomeError):  # noqa: N818  (a decision, not a fault)
    """Stopped by a signal after the state was saved, or before there was any; exit code 128 + signal number."""

    def __init__(
        self, signum: int = SIGINT, *, what: str = "stopped by a signal, state saved", where: str = "",
        fix: str = "continue with train-resume",
    ) -> None:  # fmt: skip
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + int(signum)
