"""Kill preparations with SIGKILL at random moments and file operations until each is done; the bytes must be the same.

    python tests/faults/kill_prepare.py TOKENIZER DATA FOLDER KILLS SEED

One process loads everything and forks the preparations, so that a thousand kills take minutes.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from killing import Moment, attempt
from transformers import AutoTokenizer

from llamahome.config import Config
from llamahome.data import units
from llamahome.data.prepare import prepare_folder

UNIT_BYTES = 1500


def prepare(tokenizer: Any, data: Path, folder: Path) -> None:
    config = Config.load(None, {"data.validation_split": 0.3, "data.num_workers": 1, "data.on_bad_row": "skip"})
    prepare_folder(data, tokenizer, folder, config=config, eval_data=data.with_name("eval.jsonl"))


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
    assert attempt(lambda: prepare(tokenizer, data, folder / "calm"), Moment())
    longest = time.monotonic() - began
    expected = tree(folder / "calm")
    assert len([name for name in expected if name.startswith("train/shard")]) > 10
    disturbed = folder / "disturbed"
    killed = rounds = 0
    while killed < kills:
        known: dict[str, int] = {}
        while not attempt(
            lambda: prepare(tokenizer, data, disturbed),
            Moment.draw(chance, longest=longest, operations=60, below=disturbed),
        ):
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
