"""Runs under real limits (RLIMIT_DATA): what the plan calls enough is, and too little ends at once."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA as Linux counts it"),
]  # fmt: skip
CASE: dict[str, Any] = {"samples": 0, "length": 256, "settings": {}, "steps": 3, "global": 8}
TINY, SMOLLM2 = CASE | {"model": "tiny"}, CASE | {"model": "smollm2"}


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
    found: int = script.spawn({**TINY, "steps": 0})["minimum"]
    return found


@pytest.mark.parametrize(("share", "beside"), [(1.15, False), (1.5, False), (3.0, False), (1.5, True)])
def test_a_run_finishes_within_its_limit(script: ModuleType, minimum: int, share: float, beside: bool) -> None:
    """Also beside a process that takes and frees memory."""
    other = subprocess.Popen([sys.executable, "-c", script.COMPETITOR]) if beside else None
    try:
        limit = int(share * minimum)
        found = script.spawn({**TINY, "limit": limit})
    finally:
        if other is not None:
            other.kill()
            other.wait()
    assert "error" not in found, found
    assert found["peak"] <= limit


def test_less_ends_with_code_5_before_training_and_says_what_would_do(script: ModuleType) -> None:
    """SmolLM2, since what is missing of a tiny model is less than the process itself needs."""
    minimum = script.spawn({**SMOLLM2, "steps": 0})["minimum"]
    started = time.perf_counter()
    found = script.spawn({**SMOLLM2, "limit": int(0.8 * minimum)})
    assert found["code"] == 5, found
    assert time.perf_counter() - started < 60  # seconds on a quiet machine: no weight has been read
    number, unit = re.search(r"raise training\.memory_limit to ([\d.]+) (GB|MB)", found["error"]).groups()  # type: ignore[union-attr]
    said = float(number) * {"GB": 1e9, "MB": 1e6}[unit]
    assert minimum <= said <= 1.1 * minimum
