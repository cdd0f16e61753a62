"""A crew of processes that runs of several ranks are forked from, and a model and rows for them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

CREW = Path(__file__).with_name("crew.py")
LONGEST = 150.0  # seconds that ranks may take for a run of a test; twenty are usual


class Ranks:
    """The processes of one run under way; `end` gives their exit codes."""

    def __init__(self, crew: subprocess.Popen[str], folder: Path) -> None:
        self._crew, self._folder = crew, folder
        self.pids = _answer(crew, 30)
        self.codes: list[int] | None = None

    def end(self, seconds: float = LONGEST) -> list[int]:
        """Wait for the ranks. Raises: AssertionError with what they wrote when it takes longer; they are killed."""
        try:
            self.codes = _answer(self._crew, seconds)
        except TimeoutError as error:
            self.kill()
            raise AssertionError(f"no end after {seconds:g} s\n{self.logs()}") from error
        return self.codes

    def kill(self) -> None:
        """End ranks that do not end by themselves, with the stacks of their threads in their logs."""
        if self.codes is not None:
            return
        for number, seconds in ((signal.SIGABRT, 5), (signal.SIGKILL, 30)):
            for pid in self.pids:
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, number)
            with suppress(TimeoutError):
                self.codes = _answer(self._crew, seconds)
                return
        raise AssertionError("ranks that SIGKILL does not end")

    def log(self, rank: int = 0) -> str:
        return (self._folder / f"rank-{rank}.log").read_text()

    def logs(self) -> str:
        return "\n".join(self.log(rank) for rank in range(len(self.pids)))


class Crew:
    """Starts runs of several ranks, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ranks: Ranks | None = None
        # One thread and the loopback device: what a host's name means to others is no concern here.
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen([sys.executable, str(CREW)], env=os.environ | environment, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def start(self, words: list[str], ranks: int, **environment: str) -> Ranks:
        self._end_ranks()
        self._say({"words": words, "ranks": ranks, "environment": environment, "logs": str(self._folder)})
        self._ranks = Ranks(self._process, self._folder)
        return self._ranks

    def run(self, words: list[str], ranks: int, **environment: str) -> Ranks:
        """A run that must end well. Raises: AssertionError with what its ranks wrote."""
        started = self.start(words, ranks, **environment)
        assert started.end() == [0] * ranks, started.logs()
        return started

    def learn(self, words: list[str]) -> None:
        """Load what two ranks with these words load, so that those forked later need not."""
        names = self._folder / "modules"
        self.run(words, 2, MODULES_FILE=str(names))
        self._say({"load": str(names)})
        _answer(self._process, LONGEST)

    def end(self) -> None:
        self._end_ranks()
        self._process.communicate(timeout=30)

    def _end_ranks(self) -> None:
        """A test that failed may have left its ranks behind."""
        if self._ranks is not None:
            self._ranks.kill()

    def _say(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()


def _answer(crew: subprocess.Popen[str], seconds: float) -> list[int]:
    """The crew's next line. Raises: TimeoutError when it does not come."""
    assert crew.stdout is not None
    if not select.select([crew.stdout], [], [], seconds)[0]:  # lines come one at a time: none is in the buffer
        raise TimeoutError
    numbers: list[int] = json.loads(crew.stdout.readline())
    return numbers


class Place:
    """A folder for runs of 12 steps of 8 samples, two in a micro-batch, on a tiny model without dropout."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        words = ["sea", "mill", "river", "stone", "fox", "train", "rain", "home", "station", "dog"]
        rows = [
            {"instruction": f"Write about the {words[i % 10]} number {i}.", "output": " ".join(words[: 2 + i % 7])}
            for i in range(60)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.settings: dict[str, object] = {
            "model.name": str(model), "data.path": str(folder / "rows.jsonl"), "cache.dir": str(folder / "cache"),
            "training.batch_size": 2, "training.save_steps": 4, "training.eval_steps": 6,
            "processing.precision": "fp32", "processing.compile_mode": "none", "processing.threads": 1,
            "optimization.max_steps": 12, "optimization.global_batch_size": 8, "optimization.learning_rate": 1e-3,
            "lora.rank": 4, "lora.dropout": 0.0, "resource.min_free_disk": 0, "monitor.sinks": [],
            "distributed.timeout": 60,
        }  # fmt: skip

    def train(self, output: Path, **changes: object) -> list[str]:
        """Words of the command line; `__` stands for a dot."""
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        given = self.settings | {"training.output": str(output)} | changed
        return ["train", *settings_words(given)]


def settings_words(given: dict[str, object]) -> list[str]:
    return [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Place:
    return Place(tmp_path_factory.mktemp("place"), tiny_model_dir)


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory, place: Place) -> Iterator[Crew]:
    folder = tmp_path_factory.mktemp("crew")
    made = Crew(folder)
    made.learn(place.train(folder / "first", optimization__max_steps=1, distributed__strategy="shard"))
    yield made
    made.end()
