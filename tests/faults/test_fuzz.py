"""Mutated bytes of everything that is read: an answer or one clear error, never a traceback.

LLAMAHOME_FUZZ_SECONDS is the time of each test, 3 by default.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Config
from llamahome.data.formats import find_files, read_rows
from llamahome.errors import LlamaHomeError
from llamahome.training.checkpoint import fault_of, load_state, write_manifest
from llamahome.training.rundir import read_run

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("LLAMAHOME_FUZZ_SECONDS", "3"))
WORDS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\u",
    b"\xff",
    b"\0",
    b"null",
    b"NaN",
    b"-1",
    b"1e999",
    b",",
    b"\n",
    b"\xef\xbb\xbf",
]


def mutated(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[at:at] = chance.choice(WORDS)
            case 1 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 2:
                del data[at : at + chance.randrange(1, 9)]
            case _:
                data[at:at] = data[at : at + chance.randrange(1, 60)]
    return bytes(data)


def fuzz(seed: bytes, path: Path, read: Callable[[Path], object], record: Callable[[str, object], None]) -> None:
    chance, count, end = random.Random(1), 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        content = mutated(seed, chance)
        path.write_bytes(content)
        said = ""
        try:
            read(path)
        except LlamaHomeError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(content) from error
        assert "\n" not in said, content
        count += 1
    assert count > 20
    record("corruptions", count)


def read(path: Path) -> None:
    settings = Config().data
    for row in read_rows(find_files(path, settings), settings, lambda error: None):
        str(row)


ROWS = {
    "rows.jsonl": b'{"prompt": "A number.", "completion": "one"}\n{"messages": [{"role": "user", "content": "a"}]}',
    "rows.json": b'[{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]',
    "rows.csv": b'prompt,completion\na,b\n"c, d","e\nf"\n',
    "rows.txt": "the sea\n\nthe mill, \u00e4\n".encode(),
}


@pytest.mark.parametrize("name", ROWS)
def test_damaged_rows(name: str, tmp_path: Path, record_property: Any) -> None:
    fuzz(ROWS[name], tmp_path / name, read, record_property)


@pytest.mark.parametrize("name", ["training_state.json", "manifest.json"])
def test_damaged_checkpoints(name: str, place: Any, undisturbed: Any, tmp_path: Path, record_property: Any) -> None:
    """A wrong manifest is a fault; a wrong state behind a right manifest is an error."""
    folder = Path(shutil.copytree(undisturbed(place) / "checkpoint-12", tmp_path / "checkpoint-12"))

    def read(path: Path) -> None:
        if name == "manifest.json":
            fault_of(folder)
            return
        (folder / "manifest.json").unlink()
        write_manifest(folder, 12)
        assert fault_of(folder) is None
        load_state(folder)

    fuzz((folder / name).read_bytes(), folder / name, read, record_property)


def test_damaged_records(place: Any, undisturbed: Any, tmp_path: Path, record_property: Any) -> None:
    def read(path: Path) -> None:
        Config.from_dict(read_run(path.parent)["config"])

    fuzz((undisturbed(place) / "run.json").read_bytes(), tmp_path / "run.json", read, record_property)


def test_damaged_configurations(tmp_path: Path, record_property: Any) -> None:
    seed = json.dumps(Config().to_dict()).encode()
    fuzz(seed, tmp_path / "run.yaml", lambda path: Config.load(path), record_property)
