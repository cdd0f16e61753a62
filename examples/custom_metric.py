"""A metric of your own: the share of a step's tokens that are trained.

    llamahome train data.jsonl --set 'training.metrics=[examples.custom_metric:trained_share]'

It stands in `metrics.jsonl` under the function's name. A class is made once and may remember earlier steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def trained_share(record: Mapping[str, Any]) -> float:
    """0 to 1."""
    return float(record["trained_tokens"] / record["tokens"])


class SmoothLoss:
    """The loss as an exponential mean over about 20 steps."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def __call__(self, record: Mapping[str, Any]) -> float:
        loss = float(record["loss"])
        self._mean = loss if self._mean is None else 0.95 * self._mean + 0.05 * loss
        return self._mean
