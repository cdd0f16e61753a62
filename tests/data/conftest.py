"""What tests of preparation share: settings without a validation split, small data files, the content of a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llamahome.config import Config
from llamahome.data.store import TokenStore


@pytest.fixture(scope="session")
def config() -> Callable[..., Config]:
    """A configuration from keywords, with `__` for the dot of a key."""

    def make(**values) -> Config:
        given = {key.replace("__", "."): value for key, value in values.items()}
        return Config.load(None, {"data.validation_split": 0.0} | given)

    return make


@pytest.fixture(scope="session")
def pair() -> Callable[..., dict[str, str]]:
    def make(question: str, answer: str = "It is four.") -> dict[str, str]:
        return {"prompt": question, "completion": answer}

    return make


@pytest.fixture(scope="session")
def jsonl() -> Callable[..., Path]:
    """Writes rows, or lines of text, to a file."""

    def write(path: Path, rows) -> Path:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def documents() -> Callable[[TokenStore], list[tuple[list[int], list[bool]]]]:
    """Tokens and trained marks of all documents."""

    def read(store: TokenStore) -> list[tuple[list[int], list[bool]]]:
        return [(ids.tolist(), trained.tolist()) for ids, trained in map(store.document, range(len(store)))]

    return read


@pytest.fixture
def data(tmp_path, jsonl, pair) -> Path:
    """Forty rows."""
    return jsonl(tmp_path / "data.jsonl", [pair(f"What is {i}?", f"It is {i}.") for i in range(40)])
