"""The regression suite fails on a ratio beyond its budget, and its budgets cover what it measures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    import suite

    return suite


def test_a_ratio_beyond_its_bound_is_one_line(suite):
    budgets = {"loss_speed": {"min": 1.2}, "loss_memory": {"max": 0.5}, "step_speed": {"min": 2.0}}
    assert suite.beyond({"loss_speed": 1.2, "loss_memory": 0.5, "step_speed": 3.0}, budgets) == []
    faults = suite.beyond({"loss_speed": 1.1, "loss_memory": 0.6}, budgets)
    assert faults == [
        "loss_speed: 1.100 is below 1.2",
        "loss_memory: 0.600 is above 0.5",
        "step_speed: has a budget and was not measured",
    ]


def test_every_ratio_has_a_budget(suite):
    budgets = suite.bounds_here(json.loads((HERE / "budgets.json").read_text("utf-8")), avx512_bf16=False)
    measured = {f"{name}_{kind}" for name in suite.CASES for kind in ("speed", "memory")}
    assert set(budgets) == measured | {f"reader_{key}" for key in suite.READER_KEYS}
    assert all(set(bounds) <= {"min", "max"} and bounds for bounds in budgets.values())


def test_a_processor_with_more_instructions_has_bounds_of_its_own(suite):
    budgets = {"attention_speed": {"min": 2.0, "avx512_bf16": {"min": 6.0}}, "loss_speed": {"min": 1.2}}
    plain = {"attention_speed": {"min": 2.0}, "loss_speed": {"min": 1.2}}
    assert suite.bounds_here(budgets, avx512_bf16=False) == plain
    assert suite.bounds_here(budgets, avx512_bf16=True) == plain | {"attention_speed": {"min": 6.0}}


def test_speed_is_the_references_time_by_ours(suite):
    def busy(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    sides = suite.Sides(lambda: busy(0.01), lambda: busy(0.03))
    assert 2 < suite.speed(sides, 5) < 4


def test_memory_counts_what_a_call_makes_and_not_what_was_there(suite):
    import torch

    there = torch.zeros(1 << 20)

    def run() -> None:
        made = there[:1024] + 1  # 4 KiB, from a view of 4 MiB
        _ = made * 2

    assert suite.peak(run) == 2 * 4096
