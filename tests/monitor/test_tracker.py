"""Speed figures over a window, against figures worked out by hand."""

from __future__ import annotations

import time

import pytest

from llamahome.memory.flops import TrainingFlops, training_flops
from llamahome.monitor.tracker import PerformanceTracker, measure_matmul_peak


def test_nothing_is_known_before_the_first_step() -> None:
    tracker = PerformanceTracker(total_steps=10, flops=TrainingFlops(1, 1), peak_flops=1.0)
    assert (tracker.tokens_per_second, tracker.data_wait_share, tracker.mfu, tracker.eta_seconds(0)) == (None,) * 4


def test_means_are_over_the_window_and_weighted_by_time() -> None:
    tracker = PerformanceTracker(total_steps=10, window=2)
    tracker.add(tokens=10**9, trained_tokens=0, seconds=1.0)
    tracker.add(tokens=100, trained_tokens=50, seconds=1.0, data_wait_seconds=0.1)
    tracker.add(tokens=500, trained_tokens=50, seconds=3.0, data_wait_seconds=0.3)
    assert tracker.tokens_per_second == 150.0
    assert tracker.data_wait_share == pytest.approx(0.1)
    assert tracker.eta_seconds(3) == pytest.approx(7 * 2.0)
    assert tracker.eta_seconds(12) == 0.0


def test_operations_of_lora_and_full_training() -> None:
    """SmolLM2-135M, LoRA r=16: about 0.53 GFLOP per real token where 57 % of the tokens are trained."""
    lora = training_flops(106_168_320, 28_311_552, adapter_parameters=4_884_480)
    assert lora.of(1000, 570) / 1000 == pytest.approx(0.53e9, rel=0.05)
    full = training_flops(100, 10, trains_base=True)
    assert full.of(7, 3) == 6 * (7 * 100 + 3 * 10)


def test_mfu() -> None:
    tracker = PerformanceTracker(flops=training_flops(1000, 0, trains_base=True), peak_flops=24_000.0)
    tracker.add(tokens=4, trained_tokens=0, seconds=2.0)
    assert tracker.mfu == pytest.approx(0.5)


def test_matmul_peak_is_quick_and_plausible() -> None:
    pytest.importorskip("torch")
    measure_matmul_peak(seconds=0.01)
    started = time.perf_counter()
    peak = measure_matmul_peak("fp32", seconds=0.1)
    assert time.perf_counter() - started < 2.0  # 0.1 s alone
    assert 1e8 < peak < 1e15
