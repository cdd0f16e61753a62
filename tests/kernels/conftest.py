"""Kernels in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so files named `interpreted_*.py` run in a process of their own:
`test_interpreted.py` starts one per file, and by hand it is

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_attention.py

There `use_triton` is true on a CPU, bfloat16 computes rightly, and the fixture `uninitialized_is_nan` shows every
element that a kernel leaves unwritten.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    # The folder is no package and on no path, so that it is never taken for Hugging Face's `kernels`.
    spec = importlib.util.spec_from_file_location("interpreter_bf16", Path(__file__).with_name("interpreter_bf16.py"))
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    shim.install()


@pytest.fixture
def uninitialized_is_nan() -> Iterator[None]:
    """torch.empty and its kin give NaN (floating point) or the largest integer."""
    import torch

    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
