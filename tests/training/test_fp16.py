"""fp16's scaled loss: a gradient beyond its range costs a step and lowers the scale; one that stays there ends the run.

On a CPU, where the same scaler works; no GPU was here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Config
from llamahome.errors import NonFiniteError
from llamahome.training.checkpoint import checkpoints, load_state
from llamahome.training.run import train

MODULE = """
from llamahome.kernels import linear_cross_entropy

at = None

def watch(event, loop, record):
    global at
    at = loop.state.step + 1

def loss(hidden, weight, labels, **rest):
    return linear_cross_entropy(hidden, weight, labels, **rest) * (float("{factor}") if at in {steps} else 1.0)
"""


@pytest.fixture
def run(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs in fp16 whose loss is so many times itself in some steps."""
    monkeypatch.chdir(tmp_path)

    def go(factor: str, steps: list[int]) -> Path:
        (tmp_path / "large.py").write_text(MODULE.format(factor=factor, steps=steps))
        more = {"training.loss": "large:loss", "training.callbacks": ["large:watch"], "processing.precision": "fp16",
                "optimization.max_steps": 16, "optimization.spike_factor": None}  # fmt: skip
        return train(Config.load(None, settings | more)).output

    yield go
    sys.modules.pop("large", None)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_gradient_beyond_its_range_costs_its_step(run: Any) -> None:
    found = run("1e6", [6])
    dropped = [line["step"] for line in records(found) if line.get("event") == "nonfinite"]
    assert 6 in dropped
    assert dropped[dropped.index(6) + 1 :] == []
    assert [line["step"] for line in records(found) if "event" not in line] == list(range(1, 17))
    assert load_state(checkpoints(found)[-1])[0].skipped_steps == len(dropped)


def test_one_that_stays_beyond_it_ends_the_run(run: Any) -> None:
    with pytest.raises(NonFiniteError, match=r"gradient norm (inf|nan) in step 1[34]"):
        run("1e30", list(range(4, 17)))
