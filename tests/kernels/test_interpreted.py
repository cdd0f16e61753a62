"""Every `interpreted_*.py` of this folder passes in Triton's interpreter (conftest.py says how to run one by hand)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))
WITH_SLOW_CASES = [path for path in FILES if "mark.slow" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_kernels_are_right_in_the_interpreter(path):
    _run(path, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_SLOW_CASES, ids=lambda path: path.stem)
def test_the_kernels_are_right_in_the_interpreter_at_more_shapes(path):
    _run(path, "slow")


def _run(path: Path, marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-200:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
