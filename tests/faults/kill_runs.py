"""Kill training runs with SIGKILL at random moments and file operations until each is done; the bytes must be the same.

    python tests/faults/kill_runs.py FOLDER --kills 500 --seed 0

A run has 12 steps, a checkpoint after each and evaluations between. After every kill each visible checkpoint must be
whole and the newest no older than what status.json acknowledged; then the run goes on from it. When it ends, adapter,
best adapter, optimizer, random state and the figures of all steps are those of a run that nobody disturbed. The last
line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from killing import Moment, attempt
from tiny_run import settings

from llamahome.config import Config
from llamahome.training.checkpoint import checkpoints, fault_of
from llamahome.training.run import resume, train

STEPS = 12
OPERATIONS = 420  # about those of a whole run
Outcome = tuple[list[list[object]], dict[str, bytes]]


def outcome(run: Path, steps: int = STEPS) -> Outcome:
    """The figures of all steps that do not depend on the clock, and the bytes of the states."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss")
    figures = [[line.get(key) for key in keys] for line in lines if "event" not in line]
    files = ["final/adapter_model.safetensors", "best/adapter_model.safetensors"]
    files += [f"checkpoint-{steps}/{name}.safetensors" for name in ("adapter_model", "optimizer", "rng")]
    return figures, {name: (run / name).read_bytes() for name in files}


def acknowledged(run: Path) -> int:
    """The newest step that status.json calls saved."""
    with suppress(OSError):
        status = json.loads((run / "status.json").read_text())
        words = status["message"].split()
        return int(words[1]) if words[0] == "step" else 0
    return 0


def import_what_it_needs(work: Callable[[], object], folder: Path) -> None:
    """Do the work in a process of its own, and import here what it imported there.

    Not the work itself: a process that has run a backward pass can fork no more that do.
    """
    names = folder / "modules"

    def calm() -> None:
        work()
        names.write_text("\n".join(sys.modules))

    assert attempt(calm, Moment())
    for name in names.read_text().splitlines():
        with suppress(Exception):  # some are made by other modules and cannot be imported
            importlib.import_module(name)


class Killer:
    """One undisturbed run to compare with, and runs that are killed until they are done."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.run, self.chance = folder / "run", random.Random(seed)
        given = settings(folder, optimization__max_steps=STEPS, training__save_steps=1, training__eval_steps=4)
        self.config = Config.load(None, given)
        import_what_it_needs(self.train, folder)
        shutil.rmtree(self.run)
        began = time.monotonic()
        assert attempt(self.train, Moment())
        self.longest = time.monotonic() - began
        self.expected = outcome(self.run)
        self.kills = self.resumes = self.restarts = self.runs = 0

    def train(self) -> None:
        train(self.config)

    def resume(self) -> None:
        resume(self.run)

    def kill_until_done(self) -> None:
        """A new run. Raises: AssertionError when anything was lost."""
        shutil.rmtree(self.run)
        work: Callable[[], None] = self.train
        while not attempt(work, self._moment()):
            self.kills += 1
            saved = checkpoints(self.run)
            assert [fault_of(path) for path in saved] == [None] * len(saved), saved
            newest = int(saved[-1].name.partition("-")[2]) if saved else 0
            assert newest >= acknowledged(self.run), f"step {newest}, but {acknowledged(self.run)} was acknowledged"
            if newest == STEPS and (self.run / "final").exists() and self._is_done():
                break
            work = self.resume if saved else self.train
            self.resumes += bool(saved)
            self.restarts += not saved
        self.runs += 1
        found = outcome(self.run)
        assert found[0] == self.expected[0], "the figures differ"
        differing = [name for name in found[1] if found[1][name] != self.expected[1][name]]
        assert not differing, differing

    def _moment(self) -> Moment:
        return Moment.draw(self.chance, longest=self.longest, operations=OPERATIONS, below=self.run)

    def _is_done(self) -> bool:
        return bool(json.loads((self.run / "status.json").read_text())["state"] == "done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="an empty folder [default: a temporary one]")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        killer = Killer(args.folder or Path(temporary), args.seed)
        while killer.kills < args.kills:
            killer.kill_until_done()
            print(f"{killer.kills} kills, {killer.runs} runs", file=sys.stderr)
    figures = {"kills": killer.kills, "resumes": killer.resumes, "restarts": killer.restarts, "runs": killer.runs}
    print(json.dumps(figures | {"same_bytes": True, "seconds_of_a_calm_run": round(killer.longest, 2)}))


if __name__ == "__main__":
    main()
