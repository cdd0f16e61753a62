"""A place for runs that are killed: data, settings, modules of the user's own, and real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Config
from llamahome.training.run import resume, train

MODULE = '''
import os, signal, time
from pathlib import Path
from llamahome.kernels import linear_cross_entropy

def pause(name):
    """Tell the test that this place is reached, and wait until it has done its work."""
    Path(name + ".reached").touch()
    while not Path(name + ".go").exists():
        time.sleep(0.01)

def pausing(event, loop, record):
    global counting
    counting = True  # from "train_begin" on: what is tried before the first step has no part in it
    if event == "step" and str(loop.state.step) in os.environ.get("PAUSE_STEPS", "").split():
        pause(f"step-{loop.state.step}")

counting, calls = False, 0

def loss(hidden, weight, labels, **rest):
    """The usual loss; its Nth call in a step is the last thing that the process does."""
    global calls
    calls += counting
    if counting and calls == int(os.environ.get("KILL_CALL", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return linear_cross_entropy(hidden, weight, labels, **rest)

if os.environ.get("PAUSE_LOADING"):
    pause("loading")
'''


class Workplace:
    """A folder with rows.jsonl and own.py, for runs of 12 steps of 4 samples and a checkpoint every 3 steps."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        words = ["sea", "mill", "river", "stone", "fox", "train", "rain", "home", "station", "dog"]
        rows = [
            {"instruction": f"Write about the {words[i % 10]} number {i}.", "output": " ".join(words[: 2 + i % 7])}
            for i in range(60)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "own.py").write_text(MODULE)
        self.settings: dict[str, object] = {
            "model.name": str(model),
            "data.path": str(folder / "rows.jsonl"),
            "training.output": str(folder / "run"),
            "training.callbacks": ["own:pausing"],
            "training.loss": "own:loss",
            "training.batch_size": 1,
            "training.save_steps": 3,
            "training.eval_steps": 4,
            "processing.precision": "fp32",
            "processing.compile_mode": "none",
            "processing.threads": 1,
            "optimization.max_steps": 12,
            "optimization.global_batch_size": 4,
            "optimization.learning_rate": 1e-3,
            "lora.rank": 4,
            "lora.dropout": 0.1,
            "monitor.sinks": [],
        }
        self.run = folder / "run"
        self._started: list[subprocess.Popen[str]] = []

    def words(self, *command: str, **changes: object) -> list[str]:
        given = self.settings | {key.replace("__", "."): value for key, value in changes.items()}
        pairs = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        return [*command, *(word for pair in pairs for word in ("--set", pair))]

    def start(self, words: list[str], under: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
        """`llamahome` with these words, itself an argument of the command `under`."""
        process = subprocess.Popen(
            [*under, sys.executable, "-m", "llamahome", *words], cwd=self.folder, env=os.environ | environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def resume(self, *changes: str) -> Path:
        return resume(self.run, changes, trust_run=True).output

    def reached(self, name: str, process: subprocess.Popen[str]) -> None:
        """Wait until the process pauses there."""
        deadline = time.monotonic() + 60
        while not (self.folder / f"{name}.reached").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def go(self, name: str) -> None:
        (self.folder / f"{name}.go").touch()

    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return content

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Workplace, str], Path]:
    """The folder of a whole run in fp32 or bf16, made in this process the first time."""
    runs: dict[str, Path] = {}

    def run(place: Workplace, precision: str = "fp32") -> Path:
        if precision not in runs:
            output = tmp_path_factory.mktemp("undisturbed") / "run"
            changes = {"training.output": str(output), "processing.precision": precision}
            runs[precision] = train(Config.load(None, place.settings | changes)).output
        return runs[precision]

    return run


@pytest.fixture
def place(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    made = Workplace(tmp_path, tiny_model_dir)
    yield made
    made.end()
    sys.modules.pop("own", None)
