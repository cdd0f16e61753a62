"""Losses equal those of Hugging Face Trainer + PEFT on the same samples, for every micro-batch size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "parity.py"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_twenty_steps_equal_those_of_the_peer(tiny_model_dir, data_file, method):
    """20 steps of 16 samples, micro-batches of 1, 2, 4, 16 and by token budget, fp32."""
    command = [
        sys.executable, SCRIPT, "--model", tiny_model_dir, "--data", data_file, "--method", method, "--json",
        "--learning-rate", "2e-3",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["steps"] == 20
    assert figures["max_relative_difference"] < 1e-4
