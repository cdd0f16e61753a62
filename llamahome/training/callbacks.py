"""The user's own code during a run: called with each event, may ask the run to stop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llamahome.errors import ConfigError, LlamaHomeError
from llamahome.memory.oom import is_oom
from llamahome.plugins import load_object, name_of

if TYPE_CHECKING:
    from llamahome.training.loop import TrainingLoop

Event = Literal["train_begin", "step", "evaluate", "checkpoint", "train_end"]


class Callback(Protocol):
    """Called after each event with the loop and the event's record (a step's metrics, an evaluation's figures, or
    the checkpoint's path). Returning "stop" ends the run after this step, saved."""

    def __call__(self, event: Event, loop: TrainingLoop, record: Mapping[str, Any]) -> Literal["stop"] | None: ...


def load_callbacks(names: Iterable[str | Callback]) -> list[Callback]:
    """Callbacks by name or `module:object`, and those that are there already; a class is called once, without
    arguments.

    Raises: ConfigError.
    """
    found = []
    for name in names:
        callback = load_object(name, key="training.callbacks")
        if isinstance(callback, type):
            try:
                callback = callback()
            except Exception as error:  # the user's own code may raise anything
                raise ConfigError(f"{name} cannot be made: {error}", where="training.callbacks",
                                  fix="let it be called without arguments") from error  # fmt: skip
        if not callable(callback):
            raise ConfigError(f"{name!r} cannot be called", where="training.callbacks", fix="name a function or class")
        found.append(callback)
    return found


def call_all(callbacks: Iterable[Callback], event: Event, loop: TrainingLoop, record: Mapping[str, Any]) -> bool:
    """Call each one; True when any asks to stop. Raises: ConfigError when one fails."""
    answers = []
    for callback in callbacks:
        with own_code(callback, "training.callbacks"):
            answers.append(callback(event, loop, record))
    return "stop" in answers


@contextmanager
def own_code(called: object, key: str) -> Iterator[None]:
    """Turn what an object of the user's own raises into a ConfigError that names it and its setting.

    What an out-of-memory raises is let through.
    """
    try:
        yield
    except LlamaHomeError:
        raise
    except Exception as error:  # the user's code may raise anything
        if is_oom(error):
            raise
        raise ConfigError(
            f"{name_of(called)} failed: {type(error).__name__}: {error}",
            where=key,
            fix="mend it; llamahome --debug shows where",
        ) from error
