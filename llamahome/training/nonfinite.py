"""Steps that cannot be used: loss or gradient are not finite, or the loss leaps. Whose fault it is, and what then."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import nn

from llamahome.errors import NonFiniteError
from llamahome.model.adapters import without_input_casts
from llamahome.training.step import Gradient, Ids, accumulate, seed_step

if TYPE_CHECKING:
    from llamahome.training.checkpoint import TrainingState
    from llamahome.training.loop import TrainingLoop

MAX_IN_A_ROW = 10  # dropped steps, or returns with few good steps between: then it is not the samples
_USUAL, _LEAST = 64, 16  # losses that a leap is measured against, at most and at least
_NAMED = 8


class Fault(NamedTuple):
    """What is wrong with a step; a leap is of a loss that is finite."""

    text: str
    leap: bool = False


class StepFaults:
    """What becomes of a step that cannot be used: the optimizer never sees its gradient.

    Args:
        on_nonfinite: "stop" raises NonFiniteError; "skip" drops the step; "rewind" goes back to the newest good
            checkpoint and leaves the samples to blame out from there on.
        spike_factor: a loss of so many times the median of the last 64 is such a fault, too, and rewinds; None: never.
        rewind: brings the loop back to a checkpoint; a run sets it.
    """

    def __init__(
        self, on_nonfinite: str = "stop", spike_factor: float | None = None,
        rewind: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.on_nonfinite, self.spike_factor, self.rewind = on_nonfinite, spike_factor, rewind
        self._dropped = 0  # in a row
        self._returns = 0  # without so many good steps between as a leap is measured against
        self._good = 0

    @property
    def may_rewind(self) -> bool:
        return self.on_nonfinite == "rewind" or self.spike_factor is not None

    def of(self, loss: float, norm: float, state: TrainingState) -> Fault | None:
        """What is wrong with a loss per token and a gradient norm, or None."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Fault(f"loss {loss}, gradient norm {norm}")
        usual = state.recent_losses
        if self.spike_factor is not None and len(usual) >= _LEAST:
            median = statistics.median(usual)
            if loss > self.spike_factor * median:
                return Fault(f"loss {loss:.4g}, {self.spike_factor:g} times the usual {median:.4g} or more", leap=True)
        return None

    def passed(self, loss: float, state: TrainingState) -> None:
        """Take note of a step that was used."""
        self._dropped, self._good = 0, self._good + 1
        if self._good >= _USUAL:
            self._returns = 0
        if self.spike_factor is not None:
            state.recent_losses = [*state.recent_losses[1 - _USUAL :], loss]

    def handle(
        self, loop: TrainingLoop, fault: Fault, samples: Ids, gradient: Gradient, *, overflow: bool = False
    ) -> bool:
        """Whether the loop was brought back; otherwise the step is dropped. `overflow`: fp16's, which passes.

        Raises: NonFiniteError by policy, or when it goes on.
        """
        state, rewinds = loop.state, not overflow and (fault.leap or self.on_nonfinite == "rewind")
        guilty = self._culprits(loop, samples, gradient)
        names = _names(loop, guilty)
        in_a_row = self._returns if rewinds else self._dropped
        if in_a_row + 1 >= MAX_IN_A_ROW or not (overflow or rewinds or self.on_nonfinite == "skip"):
            raise NonFiniteError(
                f"{fault.text} in step {state.step + 1}", where=f"samples {names}",
                fix="lower optimization.learning_rate, check these samples, or set optimization.on_nonfinite: skip "
                "or rewind",
            )  # fmt: skip
        step, event = state.step + 1, {"fault": fault.text, "samples": names}
        if rewinds:
            self._go_back(loop, guilty)
            loop.on_event({"event": "rewind", "step": state.step, "from_step": step, **event})
        else:
            self._dropped += 1
            state.skipped_steps += 1
            loop.on_event({"event": "nonfinite", "step": step, **event})
        return rewinds

    def _go_back(self, loop: TrainingLoop, guilty: list[int]) -> None:
        if self.rewind is None:
            raise ValueError("on_nonfinite='rewind' and spike_factor need a rewind function; a run sets it")
        left_out = {*loop.state.skipped_samples, *guilty}
        self.rewind()
        self._returns, self._good = self._returns + 1, 0
        loop.state.skipped_samples = sorted(left_out)

    def _culprits(self, loop: TrainingLoop, samples: Ids, gradient: Gradient) -> list[int]:
        """The samples of the step that are at fault by themselves; where none is on any rank, those of the
        micro-batches that are, or all. In lockstep no rank may run a sample alone: the micro-batch has to do."""
        ranks, cut = loop.team.ranks, loop.batches.cut(samples, loop.token_budget)
        losses = [float(loss) for loss in gradient.micro_losses]
        bad = [ids for ids, loss in zip(cut, losses, strict=False) if not math.isfinite(loss)]
        suspects = [int(i) for ids in (bad if ranks.any(bool(bad)) else cut) for i in ids]
        if not loop.team.in_lockstep:
            alone = [i for i in suspects if self.of(*_alone(loop, i), loop.state)]
            suspects = alone if ranks.any(bool(alone)) else suspects
        return sorted({i for share in ranks.gather(suspects) for i in share})


def left_in(samples: Ids, skipped: list[int]) -> Ids:
    """A step's samples without those that are left out."""
    return samples[~np.isin(samples, skipped)] if skipped else samples


def _alone(loop: TrainingLoop, sample: int) -> tuple[float, float]:
    """Loss per trained token and gradient norm of one sample; no gradient is left."""
    ids = np.array([sample], np.int64)
    seed_step(loop.state.seed, loop.state.step)
    loop.optimizer.zero_grad(set_to_none=True)
    with without_input_casts(loop.model, loop.precision.lowers):
        found = accumulate(loop.forward, [ids], loop.batches.build, max(1, loop.batches.trained_tokens(ids)))
    gradients = [p.grad for group in loop.optimizer.param_groups for p in group["params"] if p.grad is not None]
    loop.optimizer.zero_grad(set_to_none=True)
    return float(found.loss), float(nn.utils.get_total_norm(gradients))


def _names(loop: TrainingLoop, samples: Iterable[int]) -> str:
    """The rows of the data that these samples are from."""
    rows = [loop.batches.place(i) for i in samples]
    return ", ".join(rows[:_NAMED]) + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
