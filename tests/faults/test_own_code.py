"""Code of the user's own that fails is named with its setting, in one line, and the run's state says so."""

from __future__ import annotations

from typing import Any

import pytest

from llamahome.config import Config
from llamahome.errors import ConfigError
from llamahome.training.run import train

BROKEN = """

class Broken:
    def __init__(self, *given):
        raise ValueError("no\\nway")

class Late:
    def __call__(self, event, loop, record):
        if event == "checkpoint":
            raise ValueError("too late")

def fails(*arguments, **options):
    raise ValueError("no way")

def text(*arguments, **options):
    return "a text"

def vector(hidden, weight, labels, **rest):
    return hidden.sum(-1)

NUMBER = 7
"""
MEND = "; mend it; llamahome --debug shows where"
LOSS, CALLBACKS, SCHEDULE = "training.loss", "training.callbacks", "optimization.scheduler_type"
# the setting, its value, and what the error says
CASES: dict[str, tuple[str, object, str]] = {
    "a loss that fails": (LOSS, "own:fails", f"own:fails failed: ValueError: no way; {LOSS}{MEND}"),
    "a loss that gives a text": (LOSS, "own:text", "own:text failed: TypeError: it gave str a text, not one number"),
    "a loss per token": (LOSS, "own:vector", "own:vector failed: TypeError: it gave Tensor torch.Size"),
    "a callback that fails": (CALLBACKS, ["own:Late"], f"own:Late failed: ValueError: too late; {CALLBACKS}{MEND}"),
    "a callback that cannot be made": (CALLBACKS, ["own:Broken"], f"own:Broken cannot be made: no way; {CALLBACKS}"),
    "a number for a callback": (CALLBACKS, ["own:NUMBER"], f"'own:NUMBER' cannot be called; {CALLBACKS}"),
    "a schedule that fails": (SCHEDULE, "own:fails", f"own:fails failed: ValueError: no way; {SCHEDULE}{MEND}"),
    "a schedule of texts": (SCHEDULE, "own:text", "own:text failed: ValueError: could not convert string to float"),
    "an optimizer that fails": ("optimization.optimizer", "own:fails", "own:fails cannot be built: no way; optimiz"),
    "an optimizer that is none": ("optimization.optimizer", "own:text", "gave str, not a torch.optim.Optimizer; opt"),
    "a sink that cannot be made": ("monitor.sinks", ["own:Broken"], "'own:Broken' failed: ValueError: no way; monitor"),
    "a module that is not there": ("training.metrics", ["nowhere:f"], "'nowhere:f': No module named 'nowhere'; train"),
    "a name that is not there": (LOSS, "own:focal", "cannot load 'own:focal': module 'own' has no attribute 'focal'"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_named(place: Any, name: str) -> None:
    key, value, message = CASES[name]
    with (place.folder / "own.py").open("a") as file:
        file.write(BROKEN)
    with pytest.raises(ConfigError) as raised:
        train(Config.load(None, place.settings | {key: value}))
    assert message in str(raised.value)
    status = place.status()
    assert (status["state"], status["code"], status["message"]) == ("failed", 2, str(raised.value))
    assert status["resumable"] is (name == "a callback that fails")
