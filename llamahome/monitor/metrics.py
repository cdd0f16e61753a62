"""The record of one optimizer step: the fields of metrics.jsonl, the same for every run and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from llamahome.errors import ConfigError
from llamahome.plugins import load_object

if TYPE_CHECKING:
    from llamahome.memory.monitor import MemoryReading

StepRecord = dict[str, Any]

FIELDS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "padding_tokens",
    "tokens_per_second", "step_seconds", "data_wait_seconds", "micro_batches", "micro_batch_tokens", "memory_bytes",
    "memory_peak_bytes", "memory_limit_bytes", "gpu_utilization", "mfu",
)  # fmt: skip


class Metric(Protocol):
    """A figure of the user's own, from a step's record; its name is the function's."""

    def __call__(self, record: Mapping[str, Any]) -> float: ...


class MetricsCollector:
    """Puts together the record of each step; fields that do not apply are None.

    `flops_per_second` is the machine's peak and `flops_per_token` the model's need: both give `mfu`.
    `gpu_utilization` gives the share in use, `memory` the reading after the step.
    """

    def __init__(
        self, *, metrics: Mapping[str, Metric] | None = None, memory_limit_bytes: int | None = None,
        memory: Callable[[], MemoryReading | None] = lambda: None,
        gpu_utilization: Callable[[], float | None] = lambda: None,
    ) -> None:  # fmt: skip
        self.metrics = dict(metrics or {})
        self.memory_limit_bytes = memory_limit_bytes
        self._memory, self._gpu_utilization = memory, gpu_utilization

    def step(self, **values: Any) -> StepRecord:
        """The record of a step from what the loop knows (`step`, `loss`, `tokens`, `step_seconds`, ...)."""
        record: StepRecord = dict.fromkeys(FIELDS) | values
        reading = self._memory()
        seconds = record["step_seconds"]
        record["tokens_per_second"] = record["tokens"] / seconds if seconds else None
        record["memory_bytes"] = reading.used_bytes if reading else None
        record["memory_peak_bytes"] = reading.peak_bytes if reading else None
        record["memory_limit_bytes"] = self.memory_limit_bytes
        record["gpu_utilization"] = self._gpu_utilization()
        for name, metric in self.metrics.items():
            record[name] = metric(record)
        return record


def load_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """The functions named `module:object` in `training.metrics`, by their own names. Raises: ConfigError."""
    found: dict[str, Metric] = {}
    for name in names:
        metric = load_object(name, key="training.metrics")
        label = getattr(metric, "__name__", name.rpartition(":")[2])
        if not callable(metric) or label in FIELDS or label in found:
            raise ConfigError(f"{name!r} cannot be called, or its name is taken", where="training.metrics",
                              fix="name a function that is called like no other figure")  # fmt: skip
        found[label] = metric
    return found


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
