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
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _load(name: str) -> ModuleType:
    """A module beside this file: the folder is no package and on no path, lest it is taken for HF's `kernels`."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if INTERPRETED:
    _load("interpreter_bf16").install()
    _load("against_float64")


@pytest.fixture
def uninitialized_is_nan() -> Iterator[None]:
    """torch.empty and its kin give NaN (floating point) or the largest integer."""
    import torch

    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
