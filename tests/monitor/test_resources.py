"""Resources are sampled sparingly, and a threshold warns once until it has been left again."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llamahome.monitor.resources import ResourceMonitor, ResourceReading

QUIET = ResourceReading(0.5, 0.5, 0.5, 10**9, 0.0, 0.0, 0.0, 0.0, None, None)


def monitor(thresholds: dict[str, float | None], **settings: Any) -> ResourceMonitor:
    return ResourceMonitor(Path.cwd(), thresholds, **settings)


def test_a_sample_of_this_machine_is_plausible(tmp_path: Path) -> None:
    watched = ResourceMonitor(tmp_path, {})
    watched.sample()
    (tmp_path / "block").write_bytes(b"x" * 1_000_000)
    reading = watched.sample()
    assert 0 < (reading.memory or 0) < 1
    assert 0 <= (reading.cpu or 0) <= 1
    assert 0 < (reading.disk or 0) <= 1
    assert (reading.disk_free_bytes or 0) > 0
    assert reading.io_written is None or reading.io_written >= 0


def test_a_sample_is_cheap() -> None:
    watched = monitor({})
    watched.sample()
    started = time.process_time()
    for _ in range(20):
        watched.sample()
    assert (time.process_time() - started) / 20 < 0.01  # 1 ms alone


def test_each_crossing_warns_once_and_rearms_below(caplog: pytest.LogCaptureFixture) -> None:
    watched = monitor({"memory": 0.9, "cpu": 0.8, "disk": None})
    shares = [0.5, 0.91, 0.95, 0.89, 0.91, 0.84, 0.92]
    with caplog.at_level(logging.WARNING):
        events = [watched.warnings(replace(QUIET, memory=share, disk=1.0)) for share in shares]
    assert [len(found) for found in events] == [0, 1, 0, 0, 0, 0, 1]
    assert events[1] == [{"event": "threshold", "resource": "memory", "share": 0.91, "threshold": 0.9}]
    assert len(caplog.records) == 2


def test_several_resources_warn_apart_and_unknown_values_never() -> None:
    watched = monitor({"memory": 0.9, "cpu": 0.8, "gpu_memory": 0.1})
    reading = replace(QUIET, memory=0.95, cpu=0.9, gpu_memory=None)
    assert [event["resource"] for event in watched.warnings(reading)] == ["memory", "cpu"]


def test_check_samples_at_intervals_of_the_clock() -> None:
    times = iter([0.0, 1.0, 4.9, 5.0, 5.1])
    calls = []

    def share() -> float:
        calls.append(1)
        return 0.99

    watched = monitor({"memory": 0.9}, memory_share=share, interval=5.0, clock=lambda: next(times))
    found = [watched.check() for _ in range(5)]
    assert len(calls) == 2
    assert [len(events) for events in found] == [1, 0, 0, 0, 0]


def fake_nvml(**functions: Any) -> ModuleType:
    module = ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    defaults = {"nvmlInit": lambda: None, "nvmlDeviceGetHandleByIndex": lambda index: index}
    for name, function in (defaults | functions).items():
        setattr(module, name, function)
    return module


def test_a_gpu_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml(
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=80, memory=10),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3, total=4),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    watched = monitor({"gpu_memory": 0.7})
    reading = watched.sample()
    assert (reading.gpu_utilization, reading.gpu_memory) == (0.8, 0.75)
    assert [event["resource"] for event in watched.warnings(reading)] == ["gpu_memory"]


def test_nvml_errors_give_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise module.NVMLError("not supported")

    module = fake_nvml(nvmlDeviceGetUtilizationRates=fail, nvmlDeviceGetMemoryInfo=fail)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    reading = monitor({}).sample()
    assert (reading.gpu_utilization, reading.gpu_memory) == (None, None)
    module.nvmlInit = fail  # type: ignore[attr-defined]
    assert monitor({}).gpu_utilization() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert monitor({}).gpu_utilization() is None
