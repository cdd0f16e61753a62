"""The record of one training step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from llamahome.errors import ConfigError
from llamahome.monitor.tracker import PerformanceTracker
from llamahome.plugins import load_object

if TYPE_CHECKING:
    from llamahome.memory.monitor import MemoryReading

logger = logging.getLogger(__name__)

StepRecord: TypeAlias = dict[str, Any]
"""The fields of `FIELDS`, then custom metrics and, on evaluation steps, `eval_...`: numbers, or None."""

FIELDS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "padding_tokens",
    "tokens_per_second", "step_seconds", "data_wait_seconds", "micro_batches", "micro_batch_tokens", "memory_bytes",
    "memory_peak_bytes", "memory_limit_bytes", "gpu_utilization", "mfu",
)  # fmt: skip


class Metric(Protocol):
    """A metric of the user's own: from a step's record to a number, to several by name, or to None for no value."""

    def __call__(self, record: Mapping[str, Any], /) -> float | Mapping[str, float] | None: ...


def perplexity(record: Mapping[str, Any]) -> float:
    """exp(loss); the exponent is capped where a float ends."""
    return math.exp(min(float(record["loss"]), 700.0))


METRICS: dict[str, Metric] = {"perplexity": perplexity}


def load_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """Metrics by name, or by `module:object`; the key is the name in the record (the object's, for an import path).

    Raises: ConfigError for a name that cannot be loaded, called, or is taken.
    """
    found: dict[str, Metric] = {}
    for name in names:
        metric = load_object(name, key="training.metrics", known=METRICS)
        label = name.rpartition(":")[2].rpartition(".")[2]
        if not callable(metric):
            raise ConfigError(f"{name!r} cannot be called", where="training.metrics", fix="name a function")
        if label in FIELDS or label in found:
            raise ConfigError(f"a metric named {label!r} is there already", where="training.metrics", fix="rename it")
        found[label] = metric() if isinstance(metric, type) else metric
    return found


class MetricsCollector:
    """Builds the record of each step from what the loop knows and what can be read.

    Args:
        read_memory: gives the reading to record, for example `lambda: governor.reading`; without it the memory fields
            are None.
        memory_limit_bytes: the limit that the run holds to.
        tracker: speed over the last steps; one of its own by default.
        gpu_utilization: busy share of the GPU from 0 to 1, or None.
        metrics: the user's own, by name. One that fails is None in the record and named once in a warning.
    """

    def __init__(
        self, *, read_memory: Callable[[], MemoryReading] | None = None, memory_limit_bytes: int | None = None,
        tracker: PerformanceTracker | None = None, gpu_utilization: Callable[[], float | None] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:  # fmt: skip
        self.tracker = tracker or PerformanceTracker()
        self.memory_limit_bytes = memory_limit_bytes
        self._read_memory, self._gpu_utilization = read_memory, gpu_utilization
        self._metrics = dict(metrics or {})
        self._failed: set[str] = set()

    def step(
        self, *, step: int, epoch: float, loss: float, learning_rate: float, grad_norm: float | None, tokens: int,
        trained_tokens: int, padding_tokens: int, step_seconds: float, data_wait_seconds: float, micro_batches: int,
        micro_batch_tokens: int,
    ) -> StepRecord:  # fmt: skip
        """The record of a finished step. `tokens` are real ones, without padding; times in seconds."""
        self.tracker.add(
            tokens=tokens, trained_tokens=trained_tokens, seconds=step_seconds, data_wait_seconds=data_wait_seconds
        )
        memory = self._read_memory() if self._read_memory else None
        record: StepRecord = {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "trained_tokens": trained_tokens,
            "padding_tokens": padding_tokens,
            "tokens_per_second": tokens / step_seconds if step_seconds > 0 else None,
            "step_seconds": step_seconds,
            "data_wait_seconds": data_wait_seconds,
            "micro_batches": micro_batches,
            "micro_batch_tokens": micro_batch_tokens,
            "memory_bytes": memory.used_bytes if memory else None,
            "memory_peak_bytes": memory.peak_bytes if memory else None,
            "memory_limit_bytes": self.memory_limit_bytes,
            "gpu_utilization": self._gpu_utilization() if self._gpu_utilization else None,
            "mfu": self.tracker.mfu,
        }
        for name, metric in self._metrics.items():
            record |= self._custom(name, metric, record)
        return record

    def _custom(self, name: str, metric: Metric, record: StepRecord) -> dict[str, float | None]:
        try:
            value = metric(dict(record))
            if isinstance(value, Mapping):
                return {f"{name}_{key}": float(part) for key, part in value.items()}
            return {name: None if value is None else float(value)}
        except Exception as error:  # the user's code may raise anything; training is worth more than one figure
            if name not in self._failed:
                logger.warning("metric %s failed and is left out: %s: %s", name, type(error).__name__, error)
                self._failed.add(name)
            return {name: None}
