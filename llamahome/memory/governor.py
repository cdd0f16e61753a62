"""The one owner of the token budget: how many tokens a micro-batch may have, so that memory stays within the limit."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from itertools import combinations
from statistics import median
from typing import Any

from llamahome.errors import MemoryLimitError
from llamahome.memory.ladder import savings
from llamahome.memory.monitor import MemoryMonitor, MemoryReading, format_bytes
from llamahome.memory.oom import free_memory
from llamahome.memory.plan import MemoryPlan

logger = logging.getLogger(__name__)

# Tokens beyond which a larger micro-batch is hardly faster. CPU: SmolLM2-135M reached 91 % of its speed at 1,024
# tokens and all of it at 2,048. GPU: matrix products are compute-bound long before.
ENOUGH_TOKENS = {"cpu": 2048, "cuda": 16384}
_SURELY = 0.9  # share of a plan that a run is sure to need
AIM = 0.95  # share of the limit that a new budget is chosen for
_RESERVE = 0.02  # share of the host's memory that is left to others under pressure
_GROW = 1.1  # a budget grows only when so much more would fit
_WAIT = 3  # observations between a change and a growth
_WAIT_AFTER_OOM = 16  # doubled by each further one
_OTHERS = 0.9  # with less of the limit free, an out-of-memory is blamed on other processes
_WINDOW = 32  # observations that count
STEP = 64  # budgets are multiples of it, so that noise does not change the cut


class MemoryGovernor:
    """Chooses `token_budget` from a plan, corrects it by what was measured, and halves it after an out-of-memory.

    The same readings give the same decisions. Every change is returned as an event
    `{"event": "cut_changed", "from": tokens, "to": tokens, "reason": text}`.

    Args:
        limit_bytes: what the process (or the GPU) may hold; may be set anew at any time.
        longest_sample: tokens of the longest sample; the budget never falls below it, since samples are not cut.
        step_tokens: tokens of the largest step; a larger budget would be of no use.
        minimum: smallest budget in tokens, even where all samples are shorter.
        maximum: largest budget in tokens; by default what makes the device fast.
        release: gives freed memory back to the system; called when the budget shrinks.

    Raises: MemoryLimitError when the longest sample cannot fit into `limit_bytes`.
    """

    def __init__(
        self, limit_bytes: int, plan: MemoryPlan, monitor: MemoryMonitor, *, longest_sample: int, step_tokens: int,
        minimum: int = 64, maximum: int | None = None, release: Callable[[], None] = free_memory,
    ) -> None:  # fmt: skip
        self.limit_bytes, self.plan, self.monitor = limit_bytes, plan, monitor
        self.smallest = max(longest_sample, minimum)
        self.largest = max(self.smallest, min(step_tokens, maximum or ENOUGH_TOKENS[monitor.device.partition(":")[0]]))
        self.reading: MemoryReading = monitor.read()
        self._release = release
        self._seen: deque[tuple[int, int]] = deque(maxlen=_WINDOW)
        self._wait = self._out_of_memory = 0
        self._failed: dict[int, int] = {}  # by limit: half of the tokens that were too many for it
        self._warned = False
        smallest = plan.at(self.smallest)
        # The tensors are counted exactly, the allocator's share is not.
        if max(smallest.live, _SURELY * smallest.total) > limit_bytes:
            raise self._too_small()
        if smallest.total > limit_bytes:
            logger.warning("a plan of %s for a limit of %s: it may not fit",
                           format_bytes(smallest.total), format_bytes(limit_bytes))  # fmt: skip
        self.token_budget = self._round(plan.max_tokens(AIM * self._room()))

    def observe(self, *, micro_batch_tokens: int, reading: MemoryReading | None = None) -> dict[str, Any] | None:
        """Learn from a finished step whose largest micro-batch had `micro_batch_tokens`; returns an event or None.

        Without a `reading` the monitor is read and its peak begun anew, so call it once a step; call the monitor's
        `reset_peak` after other work, such as an evaluation. `self.reading` keeps the reading.
        """
        if reading is None:
            reading = self.monitor.read()
            self.monitor.reset_peak()
        self.reading = reading
        if not self._seen:
            logger.info("%d tokens in a micro-batch: %s predicted, %s measured", micro_batch_tokens,
                        format_bytes(self.predict(micro_batch_tokens)), format_bytes(reading.peak_bytes))  # fmt: skip
        self._seen.append((micro_batch_tokens, reading.peak_bytes))
        room = self._room()
        fits = self._round(self._tokens_within(AIM * room))
        if self.predict(self.token_budget) > room:
            reason = "others use memory" if room < self.limit_bytes else "peak above the limit"
            return self._change(min(fits, self.token_budget), reason)
        # A second try at what failed costs more than it may gain: the heap it leaves behind is in pieces.
        fits = min([fits, *(half for limit, half in self._failed.items() if limit >= self.limit_bytes)])
        if self._wait > 0:
            self._wait -= 1
        elif fits >= _GROW * self.token_budget or fits == self.largest > self.token_budget:
            return self._change(min(fits, 2 * self.token_budget), "memory is free")
        return None

    def on_oom(self, tokens: int) -> dict[str, Any]:
        """After an out-of-memory with `tokens` in the micro-batch: half as many; returns the event.

        Where no other process was to blame, the budget does not grow past that half again under this limit.

        Raises: MemoryLimitError when the budget is the smallest already; it says what would fit.
        """
        self._seen.append((tokens, int(1.05 * max(self._room(), self.predict(tokens)))))
        self._wait = _WAIT_AFTER_OOM << min(self._out_of_memory, 8)
        self._out_of_memory += 1
        if self.token_budget <= self.smallest:
            raise self._too_small()
        wait, half = self._wait, self._round(min(tokens, self.token_budget) // 2)
        if self._room() >= _OTHERS * self.limit_bytes:
            self._failed[self.limit_bytes] = half
        event = self._change(half, "out of memory")
        self._wait = wait
        assert event is not None
        return event

    def predict(self, tokens: int) -> int:
        """Expected peak in bytes with `tokens` in the largest micro-batch: the plan, corrected by what was seen."""
        base, slope = self._fit()
        return int(base + slope * self._variable(tokens))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the checkpoint: a resumed run goes on with the same cut."""
        return {
            "token_budget": self.token_budget,
            "seen": [list(pair) for pair in self._seen],
            "wait": self._wait,
            "out_of_memory": self._out_of_memory,
            "failed": list(self._failed.items()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; under a lower limit the budget may come out smaller."""
        self._seen = deque(((int(tokens), int(peak)) for tokens, peak in state["seen"]), maxlen=_WINDOW)
        self._wait, self._out_of_memory = int(state["wait"]), int(state["out_of_memory"])
        self._failed = {int(limit): int(half) for limit, half in state.get("failed", [])}
        budget = max(self.smallest, min(self.largest, int(state["token_budget"])))
        fits = self.predict(budget) <= self.limit_bytes
        self.token_budget = budget if fits else min(budget, self._round(self._tokens_within(AIM * self.limit_bytes)))

    def _change(self, budget: int, reason: str) -> dict[str, Any] | None:
        before, self.token_budget = self.token_budget, budget
        if budget == before:
            if not self._warned:
                logger.warning("%s at the smallest cut of %d tokens: %s of %s", reason, budget,
                               format_bytes(self.reading.peak_bytes), format_bytes(self.limit_bytes))  # fmt: skip
                self._warned = True
            return None
        self._wait = _WAIT
        if budget < before:
            self._release()
            self.monitor.reset_peak()  # what was given back is no part of the next step's peak
        return {"event": "cut_changed", "from": before, "to": budget, "reason": reason}

    def _round(self, tokens: int) -> int:
        return max(self.smallest, min(self.largest, tokens // STEP * STEP if tokens < self.largest else tokens))

    def _room(self) -> int:
        """Bytes that this process may reach: the limit, or what other processes leave."""
        reachable = self.reading.used_bytes + self.reading.available_bytes - int(_RESERVE * self.reading.total_bytes)
        return min(self.limit_bytes, max(0, reachable))

    def _variable(self, tokens: int) -> int:
        return self.plan.at(tokens).total - self.plan.fixed_bytes

    def _tokens_within(self, target: float) -> int:
        base, slope = self._fit()
        return self.plan.max_tokens(self.plan.fixed_bytes + max(0.0, target - base) / slope)

    def _fit(self) -> tuple[float, float]:
        """(base, slope) of peak = base + slope x the plan's bytes that depend on the cut.

        Slope: the median over pairs of observations that differ enough (Theil 1950, Sen 1968). Base: the highest
        that any observation asks for, since it is the peaks that must stay below the limit.
        """
        points = sorted({(self._variable(tokens), peak) for tokens, peak in self._seen})
        if not points:
            return self.plan.fixed_bytes, 1.0
        slopes = [(q - p) / (y - x) for (x, p), (y, q) in combinations(points, 2) if y >= 1.25 * x]
        slope = median(slopes) if len(slopes) >= 3 else self._single_slope(points)
        slope = min(4.0, max(0.5, slope))
        return max(peak - slope * x for x, peak in points), slope

    def _single_slope(self, points: list[tuple[int, int]]) -> float:
        """With cuts of one size only: a peak above the plan is blamed on the tokens, one below it on the rest."""
        x, peak = max(points, key=lambda point: point[1])
        return max(1.0, (peak - self.plan.fixed_bytes) / max(1, x))

    def _too_small(self) -> MemoryLimitError:
        need = self.predict(self.smallest)
        advice = [f"raise training.memory_limit to {format_bytes(1.05 * need)}"]
        advice += savings(self.plan, longest=self._tokens_within(self.limit_bytes), missing=need - self.limit_bytes)
        return MemoryLimitError(
            f"a micro-batch of {self.smallest} tokens needs about {format_bytes(need)}, "
            f"{format_bytes(self.limit_bytes)} may be used",
            where="training.memory_limit", fix=", or ".join(advice),
        )  # fmt: skip
