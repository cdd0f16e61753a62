"""The GPU benchmark runs through everything it does, tiny and on a CPU; without a GPU it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
KERNELS = (
    "attention", "attention, window 2", "attention, soft-cap 50", "rms_norm", "add_rms_norm", "rope", "gated",
    "linear_cross_entropy", "norm + q, k, v with LoRA + rope", "MLP with LoRA", "output + norm + MLP with LoRA",
)  # fmt: skip
FORWARD_ONLY = "LoRA linear, few rows", "LoRA linear in 4 bits, few rows", "4 bits made dense"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    done = run("--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_timed_and_as_exact_as_plain_pytorch(figures, kernel):
    ours, eager = (figures[f"tiny/{kernel}/{operation}/error"] for operation in ("ours", "eager"))
    assert 0 < ours <= max(1.5 * eager, 1e-5)
    for operation in ("ours", "eager"):
        assert figures[f"tiny/{kernel}/{operation}/forward_ms"] > 0
        assert figures[f"tiny/{kernel}/{operation}/both_ms"] > 0


@pytest.mark.parametrize("kernel", FORWARD_ONLY)
def test_kernels_without_a_gradient_are_timed(figures, kernel):
    ours, eager = (figures.get(f"tiny/{kernel}/{operation}/error", 0.0) for operation in ("ours", "eager"))
    assert ours <= max(1.5 * eager, 1e-5)
    assert figures[f"tiny/{kernel}/ours/forward_ms"] > 0


@pytest.mark.parametrize("variant", ["transformers + PEFT", "ours", "ours, fused"])
def test_training_steps_are_timed(figures, variant):
    assert figures[f"tiny, 2 layers/training step/{variant}/tokens_per_s"] > 0
    assert 0 < figures[f"tiny, 2 layers/training step/{variant}/mfu"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_what_is_missing():
    done = run("--quick")
    assert done.returncode == 9
    assert done.stderr.count("\n") == 1
    assert "no GPU" in done.stderr


def test_a_wrong_kernel_and_a_failing_rival_are_named(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu
    from gpu_kernels import TINY, cases

    case = next(case for case in cases(TINY, torch.device("cpu")) if case.name == "gated")
    torch.manual_seed(0)
    wrong = case._replace(ours=lambda e, g: 1.01 * case.reference(e, g))
    ours, plain = gpu.errors(wrong, TINY.tokens)
    rows = [
        {"shape": "tiny", "kernel": "gated", "operation": "ours", "error": ours},
        {"shape": "tiny", "kernel": "gated", "operation": "eager", "error": plain},
    ]
    assert len(gpu.inexact(rows)) == 1
    assert gpu.inexact(rows[::-1]) == []

    def refuses(e: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not on this device")

    row = gpu.measured(case, refuses, TINY.tokens, torch.device("cpu"), 1)
    assert row == {"failed": "NotImplementedError: not on this device"}


def test_a_leak_is_found_and_what_has_no_time_is_left_out(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu
    from gpu_kernels import TINY, cases

    cpu = torch.device("cpu")
    case = next(case for case in cases(TINY, cpu) if case.isolated)
    assert not gpu.leaks(case, case.ours, TINY.tokens)
    leaky = lambda q, k, v: case.ours(q, k, v) + 1e-2 * v.mean()  # noqa: E731
    assert gpu.leaks(case, leaky, TINY.tokens)
    row = gpu.measured(case._replace(ours=leaky), leaky, TINY.tokens, cpu, 1)
    assert gpu.inexact([{"shape": "tiny", "kernel": "attention", "operation": "ours"} | row]) == [
        "tiny, attention: leaks"
    ]
    left = gpu.kernel_rows(TINY, cpu, 1, until=0.0)
    assert len(left) == len(list(cases(TINY, cpu)))
    assert all(row["failed"] == gpu.LEFT_OUT for row in [*left, *gpu.model_rows(TINY, 1, cpu, 1, until=0.0)])
    assert gpu.inexact(left) == []
    assert gpu.KERNEL_SECONDS < gpu.LAST_START < 8 * 60
