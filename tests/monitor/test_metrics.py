"""The record of a step has exactly the documented fields, and the user's own metrics cannot break a run."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import ConfigError
from llamahome.memory.flops import TrainingFlops
from llamahome.memory.monitor import MemoryReading
from llamahome.monitor.metrics import FIELDS, MetricsCollector, load_metrics
from llamahome.monitor.tracker import PerformanceTracker

DOCUMENTED = """
step epoch loss learning_rate grad_norm tokens trained_tokens padding_tokens tokens_per_second
step_seconds data_wait_seconds micro_batches micro_batch_tokens memory_bytes memory_peak_bytes memory_limit_bytes
gpu_utilization mfu
"""

STEP: dict[str, Any] = {
    "step": 3, "epoch": 0.25, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens": 1000,
    "trained_tokens": 400, "padding_tokens": 24, "step_seconds": 2.0, "data_wait_seconds": 0.1, "micro_batches": 2,
    "micro_batch_tokens": 640,
}  # fmt: skip


def test_fields_are_the_documented_ones() -> None:
    record = MetricsCollector().step(**STEP)
    assert list(record) == DOCUMENTED.split() == list(FIELDS)
    assert {name: record[name] for name in STEP} == STEP
    assert record["tokens_per_second"] == 500.0
    nulls = ("memory_bytes", "memory_peak_bytes", "memory_limit_bytes", "gpu_utilization", "mfu")
    assert [record[name] for name in nulls] == [None] * 5


def test_memory_speed_and_gpu_are_filled_in() -> None:
    collector = MetricsCollector(
        read_memory=lambda: MemoryReading(10, 20, 40, 30),
        memory_limit_bytes=36,
        tracker=PerformanceTracker(flops=TrainingFlops(100.0, 50.0), peak_flops=1e6),
        gpu_utilization=lambda: 0.75,
    )
    record = collector.step(**STEP)
    assert (record["memory_bytes"], record["memory_peak_bytes"], record["memory_limit_bytes"]) == (10, 20, 36)
    assert record["gpu_utilization"] == 0.75
    assert record["mfu"] == pytest.approx((1000 * 100 + 400 * 50) / 2.0 / 1e6)


def test_own_metrics_by_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics.py").write_text(
        "def bits(record): return record['loss'] / 0.6931471805599453\n"
        "class Shares:\n    def __call__(self, record): return {'real': record['tokens'] / 1024}\n"
    )
    monkeypatch.chdir(tmp_path)
    collector = MetricsCollector(metrics=load_metrics(["perplexity", "own_metrics:bits", "own_metrics:Shares"]))
    record = collector.step(**STEP)
    assert record["perplexity"] == pytest.approx(math.exp(2.0))
    assert record["bits"] == pytest.approx(2.0 / math.log(2))
    assert record["Shares_real"] == pytest.approx(1000 / 1024)


def test_a_metric_that_fails_is_null_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def broken(record: Any) -> float:
        raise KeyError("nothing")

    collector = MetricsCollector(metrics={"broken": broken, "text": lambda record: "much"})  # type: ignore[dict-item,return-value]
    with caplog.at_level(logging.WARNING):
        records = [collector.step(**STEP) for _ in range(3)]
    assert all(record["broken"] is None and record["text"] is None for record in records)
    assert [record.getMessage().split()[1] for record in caplog.records] == ["broken", "text"]


@pytest.mark.parametrize("name", ["perplexty", "math:nothing", "math:pi", "no_such_module:x", "os.path:step"])
def test_a_metric_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="metrics"):
        load_metrics([name])


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="there already"):
        load_metrics(["perplexity", "perplexity"])
