"""Speed: tokens per second, time left, time lost to data, and the share of the machine's arithmetic that is used."""

from __future__ import annotations

import time
from collections import deque

from llamahome.memory.flops import TrainingFlops

WINDOW = 20


class PerformanceTracker:
    """Keeps the last steps' tokens and times.

    Args:
        total_steps: steps of the whole run, for `eta_seconds`.
        flops, peak_flops: operations per step and the machine's limit per second, for `mfu`; None where unknown.
        window: steps that the means are taken over.
    """

    def __init__(
        self, *, total_steps: int | None = None, flops: TrainingFlops | None = None, peak_flops: float | None = None,
        window: int = WINDOW,
    ) -> None:  # fmt: skip
        self.total_steps, self.flops, self.peak_flops = total_steps, flops, peak_flops
        self._steps: deque[tuple[int, int, float, float]] = deque(maxlen=window)

    def add(self, *, tokens: int, trained_tokens: int, seconds: float, data_wait_seconds: float = 0.0) -> None:
        """Count a finished step."""
        self._steps.append((tokens, trained_tokens, seconds, data_wait_seconds))

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens per second over the window."""
        tokens, _, seconds, _ = self._sums()
        return tokens / seconds if seconds > 0 else None

    @property
    def data_wait_share(self) -> float | None:
        """Share of the time spent waiting for data, 0 to 1."""
        _, _, seconds, waiting = self._sums()
        return waiting / seconds if seconds > 0 else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation over the window (Chowdhery et al. 2022): operations needed by operations possible."""
        tokens, trained, seconds, _ = self._sums()
        if self.flops is None or not self.peak_flops or seconds <= 0:
            return None
        return self.flops.of(tokens, trained) / seconds / self.peak_flops

    def eta_seconds(self, step: int) -> float | None:
        """Seconds left after `step` finished steps, at the window's pace."""
        if self.total_steps is None or not self._steps:
            return None
        return max(0, self.total_steps - step) * self._sums()[2] / len(self._steps)

    def _sums(self) -> tuple[int, int, float, float]:
        tokens, trained, seconds, waiting = zip((0, 0, 0.0, 0.0), *self._steps, strict=True)
        return sum(tokens), sum(trained), sum(seconds), sum(waiting)


def measure_matmul_peak(dtype: str = "fp32", device: str = "cpu", seconds: float = 0.2) -> float:
    """The machine's FLOP per second in square matrix products of `dtype` ("fp32", "bf16", "fp16"): the best of many.

    Takes about `seconds`. By the library that the engine's own products run on; on a shared machine a lower bound.
    """
    import torch

    from llamahome.kernels.products import multiply

    size = 1024 if device == "cpu" else 4096
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    left, right = (torch.ones(size, size, dtype=kind, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        multiply(left, right)
        if device != "cpu":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - started)
        if now + best > end:
            return 2 * size**3 / best
