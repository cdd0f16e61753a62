"""SmolLM2-135M under real limits (RLIMIT_DATA): what the plan calls enough is, and too little ends at once."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA as Linux counts it"),
]  # fmt: skip
CASE: dict[str, Any] = {"model": "smollm2", "samples": 0, "length": 128, "settings": {}, "steps": 1, "global": 2}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "governor.py"
    spec = importlib.util.spec_from_file_location("governor_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def minimum(script: ModuleType) -> int:
    found: int = script.spawn({**CASE, "steps": 0})["minimum"]
    return found


def test_a_little_more_than_the_minimum_is_enough(script: ModuleType, minimum: int) -> None:
    limit = int(1.15 * minimum)
    found = script.spawn({**CASE, "limit": limit})
    assert "error" not in found
    assert found["peak"] <= limit


def test_less_ends_with_code_5_before_training_and_says_what_would_do(script: ModuleType, minimum: int) -> None:
    started = time.perf_counter()
    found = script.spawn({**CASE, "limit": int(0.8 * minimum)})
    assert found["code"] == 5, found
    assert time.perf_counter() - started < 60  # seconds on a quiet machine: no weight has been read
    number, unit = re.search(r"raise training\.memory_limit to ([\d.]+) (GB|MB)", found["error"]).groups()  # type: ignore[union-attr]
    said = float(number) * {"GB": 1e9, "MB": 1e6}[unit]
    assert minimum <= said <= 1.1 * minimum
