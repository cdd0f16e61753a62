"""The training loop: iterate over it, each item is the record of one optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llamahome.errors import NonFiniteError
from llamahome.memory.governor import MemoryGovernor
from llamahome.memory.gpu import saving_in_host_memory
from llamahome.memory.oom import OOMHandler, is_oom
from llamahome.model.adapters import without_input_casts
from llamahome.monitor.metrics import MetricsCollector, StepRecord
from llamahome.training.checkpoint import TrainingState
from llamahome.training.objective import Objective, build_objective
from llamahome.training.optim import constant
from llamahome.training.precision import Precision
from llamahome.training.step import Gradient, Ids, StepBatches, accumulate, clip_gradients, seed_step
from llamahome.training.team import SINGLE, Team

_MAX_SKIPPED_IN_A_ROW = 10


class TrainingLoop:
    """One optimizer step per item, from `state.step` to `state.total_steps`.

    A step's samples follow from the seed and the step's number. How they are cut is the governor's choice (or
    `batches.max_samples`) and changes the result by rounding only. Out of memory inside a step: the partial gradient
    is dropped, the cut made smaller, and the same samples run again.

    Args:
        model: a causal language model of transformers, plain or wrapped by PEFT.
        optimizer: over the model's trained parameters.
        batches: the samples and their cut.
        state: where to begin and end; its `step` counts finished steps.
        on_nonfinite: "stop" raises NonFiniteError before the optimizer sees the gradient; "skip" drops the step.
        on_event: receives out-of-memory, changed-cut and skipped-step events as plain dicts.
        team: the other ranks of the run; each runs this loop, and every step is one step of all.
    """

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, batches: StepBatches, *, state: TrainingState,
        objective: Objective | None = None, scheduler: Any = None, precision: Precision | None = None,
        governor: MemoryGovernor | None = None, max_grad_norm: float | None = 1.0, on_nonfinite: str = "stop",
        metrics: MetricsCollector | None = None, on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        team: Team = SINGLE,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.batches, self.state = model, optimizer, batches, state
        self.objective = objective or build_objective(model)
        self.scheduler = scheduler or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: constant(step, 0, 0))
        self.precision = precision or Precision("fp32", next(model.parameters()).device.type)
        self.governor, self.team = governor, team
        self.max_grad_norm, self.on_nonfinite, self.on_event = max_grad_norm, on_nonfinite, on_event
        self.metrics = metrics or MetricsCollector()
        self.scaler = torch.amp.GradScaler(self.precision.device, enabled=self.precision.scales_loss)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._oom = OOMHandler(governor) if governor is not None else None
        self._first_step = state.step
        self._skipped_in_a_row = 0
        self._stop = False

    def __len__(self) -> int:
        return self.state.total_steps - self.state.step

    def __iter__(self) -> Iterator[StepRecord]:
        self.model.train()
        while self.state.step < self.state.total_steps and not self._stop:
            yield self.run_step()

    def stop(self) -> None:
        """End the iteration after the step under way."""
        self._stop = True

    def run_step(self) -> StepRecord:
        """Gradient, check, clip, update; returns the step's record. Raises: NonFiniteError, MemoryLimitError."""
        started = time.perf_counter()
        samples = self.batches.order.samples(self.state.step)
        self.batches.prefetch(self.state.step, first=self.state.step == self._first_step)
        trained = self.batches.trained_tokens(samples)
        gradient = self._gradient(samples, trained)
        together = self.team.combine(gradient, self._parameters, time.perf_counter() - started)
        self.scaler.unscale_(self.optimizer)
        norm = float(clip_gradients(self._parameters, self.max_grad_norm))
        loss = float(gradient.loss)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        finite = math.isfinite(loss) and math.isfinite(norm)
        # fp16: a gradient beyond its range is the scaler's to skip, as long as it does not go on.
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not finite
        if finite or overflow:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if finite:
            self._skipped_in_a_row = 0
        else:
            self._nonfinite(loss, norm, samples, gradient, stop=self.on_nonfinite == "stop" and not overflow)
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.state.step += 1
        self.state.tokens += gradient.tokens
        self._observe(gradient)
        record = self.metrics.step(
            step=self.state.step,
            epoch=self.batches.order.epoch(self.state.step),
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            tokens=gradient.tokens,
            trained_tokens=trained,
            padding_tokens=gradient.padding_tokens,
            step_seconds=time.perf_counter() - started,
            data_wait_seconds=gradient.wait_seconds,
            micro_batches=gradient.micro_batches,
            micro_batch_tokens=gradient.micro_batch_tokens,
        )
        return record | together

    def _gradient(self, samples: Ids, trained: int) -> Gradient:
        """The step's gradient, replayed with a smaller cut when memory runs out."""
        budget = self.team.budget(self._budget())
        if self.governor is not None and budget is not None:
            self.governor.token_budget = budget
        while True:
            seed_step(self.state.seed, self.state.step, self.team.ranks.rank)
            cut = self.batches.cut(samples, budget)
            try:
                with without_input_casts(self.model, self.precision.lowers):
                    return accumulate(self._forward, cut, self.batches.build, max(1, trained), self.scaler.scale)
            except Exception as error:
                # In lockstep the others wait inside of the step: only a restart with a smaller cut helps.
                if self._oom is None or not is_oom(error) or self.team.in_lockstep:
                    raise
                longest = max(int(self.batches.store.lengths(ids).sum()) for ids in cut)
                failure = error.with_traceback(None)  # the frames hold the activations
            self.optimizer.zero_grad(set_to_none=True)
            for event in self._oom.handle(failure, micro_batch_tokens=longest, step=self.state.step + 1):
                self.on_event(event)
            budget = self._budget()

    def _forward(self, batch: Any) -> torch.Tensor:
        self.team.progress()
        offload = self.governor is not None and self.governor.plan.offload
        with self.precision.autocast(), saving_in_host_memory(offload, self.precision.device):
            return self.objective(batch)

    def _budget(self) -> int | None:
        return self.governor.token_budget if self.governor is not None else None

    def _observe(self, gradient: Gradient) -> None:
        if self.governor is None:
            return
        event = self.governor.observe(micro_batch_tokens=gradient.micro_batch_tokens)
        if event is not None:
            self.on_event({"step": self.state.step, **event})
        self.state.plan = self.governor.state_dict()

    def _nonfinite(self, loss: float, norm: float, samples: Ids, gradient: Gradient, *, stop: bool) -> None:
        """Stop, or count the dropped step; too many in a row stop in any case."""
        fault = f"loss {loss}, gradient norm {norm} in step {self.state.step + 1}"
        names = self._culprits(samples, gradient)
        self._skipped_in_a_row += 1
        self.state.skipped_steps += 1
        if stop or self._skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                fault, where=f"samples {names}",
                fix="lower optimization.learning_rate, check these samples, or set optimization.on_nonfinite: skip",
            )  # fmt: skip
        self.on_event({"event": "nonfinite", "step": self.state.step + 1, "loss": loss, "grad_norm": norm,
                       "samples": names})  # fmt: skip

    def _culprits(self, samples: Ids, gradient: Gradient) -> str:
        """Rows of the data whose micro-batch has a non-finite loss, or all of the step's."""
        cut = self.batches.cut(samples, self._budget())
        own = [ids for ids, loss in zip(cut, gradient.micro_losses, strict=False) if not math.isfinite(float(loss))]
        bad = [ids for share in self.team.ranks.gather(own) for ids in share]
        rows = [self.batches.place(int(i)) for ids in bad or [samples] for i in ids]
        return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
