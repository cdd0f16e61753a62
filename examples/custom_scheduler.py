"""A learning-rate schedule of your own: the inverse square root of the step (Vaswani et al. 2017).

llamahome train data.jsonl --set optimization.scheduler_type=examples.custom_scheduler:inverse_sqrt
"""

from __future__ import annotations


def inverse_sqrt(step: int, total: int, warmup: int) -> float:
    """Factor on `optimization.learning_rate` before step `step` (from 0) of `total`."""
    warmup = max(warmup, 1)
    return min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)
