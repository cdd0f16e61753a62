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
CASE: dict[str, Any] = {"samples": 0, "length": 256, "settings": {}, "steps": 2, "global": 4}


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
def small(script: ModuleType, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A case of a model with eight layers, 512 wide, and the smallest limit for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4,
    )).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer.save_pretrained(folder)
    case = CASE | {"model": str(folder)}
    return case | {"minimum": script.spawn({**case, "steps": 0})["minimum"]}


@pytest.mark.parametrize(("share", "beside"), [(1.15, False), (1.5, True), (3.0, False)])
def test_a_run_finishes_within_its_limit(
    script: ModuleType, small: dict[str, Any], share: float, beside: bool
) -> None:  # fmt: skip
    """Also beside a process that takes and frees memory."""
    other = subprocess.Popen([sys.executable, "-c", script.COMPETITOR]) if beside else None
    try:
        limit = int(share * small["minimum"])
        found = script.spawn({**small, "limit": limit})
    finally:
        if other is not None:
            other.kill()
            other.wait()
    assert "error" not in found, found
    assert found["peak"] <= limit


def test_less_ends_with_code_5_before_training_and_says_what_would_do(script: ModuleType) -> None:
    """SmolLM2, since what is missing of a small model is less than the process itself needs."""
    smollm2 = CASE | {"model": "smollm2"}
    minimum = script.spawn({**smollm2, "steps": 0})["minimum"]
    started = time.perf_counter()
    found = script.spawn({**smollm2, "limit": int(0.8 * minimum)})
    assert found["code"] == 5, found
    assert time.perf_counter() - started < 60  # seconds on a quiet machine: no weight has been read
    number, unit = re.search(r"raise training\.memory_limit to ([\d.]+) (GB|MB)", found["error"]).groups()  # type: ignore[union-attr]
    said = float(number) * {"GB": 1e9, "MB": 1e6}[unit]
    assert minimum <= said <= 1.1 * minimum
