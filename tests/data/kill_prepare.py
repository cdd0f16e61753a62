"""Kill preparations with SIGKILL at random moments and file operations until each is done; the bytes must be the same.

    python tests/data/kill_prepare.py TOKENIZER DATA FOLDER KILLS SEED

One process loads everything and forks the preparations, so that a thousand kills take minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llamahome.config import Config
from llamahome.data import units
from llamahome.data.prepare import prepare_folder

UNIT_BYTES = 1500
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def prepare(tokenizer: Any, data: Path, folder: Path, kill_at: int = 0) -> None:
    """In a process of its own; killed at the file operation number `kill_at`."""
    config = Config.load(None, {"data.validation_split": 0.3, "data.num_workers": 1, "data.on_bad_row": "skip"})
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and str(folder) in str(arguments[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    prepare_folder(data, tokenizer, folder, config=config, eval_data=data.with_name("eval.jsonl"))
    print(f"operations {count}", file=sys.stderr)


def attempt(work: tuple[Any, Path, Path], chance: random.Random, longest: float) -> bool:
    """One forked preparation, killed somewhere; whether it got to its end."""
    by_time = chance.random() < 0.5
    child = os.fork()
    if child == 0:
        try:
            prepare(*work, 0 if by_time else chance.randrange(1, 60))
        except BaseException as error:
            print(f"failed: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    if by_time:
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"status {status}"
    return status == 0


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished_units(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("journal/unit-*.json")}


def main() -> None:
    tokenizer, data, folder = AutoTokenizer.from_pretrained(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    kills, chance = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    units.MIN_UNIT_BYTES = UNIT_BYTES
    units._UNITS = 1 << 20
    began = time.monotonic()
    if os.fork() == 0:
        prepare(tokenizer, data, folder / "calm")
        os._exit(0)
    assert os.wait()[1] == 0
    longest = time.monotonic() - began
    expected = tree(folder / "calm")
    assert len([name for name in expected if name.startswith("train/shard")]) > 10
    killed = rounds = 0
    while killed < kills:
        known: dict[str, int] = {}
        disturbed = folder / "disturbed"
        while not attempt((tokenizer, data, disturbed), chance, longest):
            killed += 1
            now = finished_units(disturbed)
            assert known.items() <= now.items() or (disturbed / "report.json").exists(), "finished work was lost"
            known = now
        found = tree(disturbed)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        assert found == expected, [name for name in found if found[name] != expected[name]]
        shutil.rmtree(disturbed)
        rounds += 1
        print(f"{killed} kills so far", file=sys.stderr)
    print(f"{killed} kills in {rounds} preparations of {len(expected)} files: same bytes")


if __name__ == "__main__":
    main()
