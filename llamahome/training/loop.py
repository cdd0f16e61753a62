"""The training loop: iterate over it, each item is the record of one optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from llamahome.memory.governor import MemoryGovernor
from llamahome.memory.gpu import saving_in_host_memory
from llamahome.memory.oom import OOMHandler, is_oom
from llamahome.model.adapters import without_input_casts
from llamahome.monitor.metrics import MetricsCollector, StepRecord
from llamahome.training.checkpoint import TrainingState
from llamahome.training.nonfinite import StepFaults, left_in
from llamahome.training.objective import Objective, build_objective
from llamahome.training.optim import constant
from llamahome.training.precision import Precision
from llamahome.training.step import Gradient, Ids, StepBatches, accumulate, clip_gradients, seed_step
from llamahome.training.team import SINGLE, Team
from llamahome.training.update import update_weights


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
        on_nonfinite, spike_factor: what becomes of a step that cannot be used, see `StepFaults`.
        on_event: receives out-of-memory, changed-cut and skipped-step events as plain dicts.
        team: the other ranks of the run; each runs this loop, and every step is one step of all.
        begin_step: called before each step, and again where one is repeated, with the number of finished ones.
    """

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, batches: StepBatches, *, state: TrainingState,
        objective: Objective | None = None, scheduler: Any = None, precision: Precision | None = None,
        governor: MemoryGovernor | None = None, max_grad_norm: float | None = 1.0, on_nonfinite: str = "stop",
        metrics: MetricsCollector | None = None, on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        team: Team = SINGLE, spike_factor: float | None = None, begin_step: Callable[[int], None] = lambda step: None,
    ) -> None:  # fmt: skip
        self.begin_step = begin_step
        self.model, self.optimizer, self.batches, self.state = model, optimizer, batches, state
        self.objective = objective or build_objective(model)
        self.scheduler = scheduler or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: constant(step, 0, 0))
        self.precision = precision or Precision("fp32", next(model.parameters()).device.type)
        self.governor, self.team = governor, team
        self.max_grad_norm, self.on_event = max_grad_norm, on_event
        self.faults = StepFaults(on_nonfinite, spike_factor)
        self.metrics = metrics or MetricsCollector()
        self.scaler = torch.amp.GradScaler(self.precision.device, enabled=self.precision.scales_loss)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._oom = OOMHandler(governor) if governor is not None else None
        self._first_step = state.step
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

    def go_back(self, state: TrainingState) -> None:
        """Take up an earlier state of this run, whose weights and optimizer are back already."""
        vars(self.state).update(vars(replace(state, total_steps=self.state.total_steps)))
        self._first_step = state.step

    def run_step(self) -> StepRecord:
        """Gradient, check, clip, update; returns the step's record. Raises: NonFiniteError, MemoryLimitError.

        After a return to a checkpoint it is the record of the step after that.
        """
        while (record := self._try_step()) is None:
            pass
        return record

    def _try_step(self) -> StepRecord | None:
        started = time.perf_counter()
        self.begin_step(self.state.step)
        samples = left_in(self.batches.order.samples(self.state.step), self.state.skipped_samples)
        self.batches.prefetch(self.state.step, first=self.state.step == self._first_step)
        trained = self.batches.trained_tokens(samples)
        gradient = self._gradient(samples, trained)
        together = self.team.combine(gradient, self._parameters, time.perf_counter() - started)
        # The scaler asks for gradients; there are none where all samples are left out.
        has_gradient = gradient.micro_batches > 0 or not self.scaler.is_enabled()
        if has_gradient:
            self.scaler.unscale_(self.optimizer)
        norm = float(clip_gradients(self._parameters, self.max_grad_norm))
        loss = float(gradient.loss)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])  # torchao's is a tensor
        fault = self.faults.of(loss, norm, self.state)
        # fp16: a gradient beyond its range is the scaler's to skip, as long as it does not go on.
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        if has_gradient:
            if fault is None or overflow:
                update_weights(partial(self.scaler.step, self.optimizer), self.optimizer)
            self.scaler.update()
        if fault is None and gradient.micro_batches:
            self.faults.passed(loss, self.state)
        elif fault is not None and self.faults.handle(self, fault, samples, gradient, overflow=overflow):
            return None
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
        budget = self.team.budget(self.token_budget)
        if self.governor is not None and budget is not None:
            self.governor.token_budget = budget
        while True:
            seed_step(self.state.seed, self.state.step, self.team.ranks.rank)
            cut = self.batches.cut(samples, budget)
            try:
                with without_input_casts(self.model, self.precision.lowers):
                    return accumulate(self.forward, cut, self.batches.build, max(1, trained), self.scaler.scale)
            except Exception as error:
                # In lockstep the others wait inside of the step: only a restart with a smaller cut helps.
                if self._oom is None or not is_oom(error) or self.team.in_lockstep:
                    raise
                longest = max(int(self.batches.store.lengths(ids).sum()) for ids in cut)
                failure = error.with_traceback(None)  # the frames hold the activations
            self.optimizer.zero_grad(set_to_none=True)
            for event in self._oom.handle(failure, micro_batch_tokens=longest, step=self.state.step + 1):
                self.on_event(event)
            budget = self.token_budget

    def forward(self, batch: Any) -> torch.Tensor:
        """The summed loss of a micro-batch, in the run's precision."""
        self.team.progress()
        offload = self.governor is not None and self.governor.plan.offload
        with self.precision.autocast(), saving_in_host_memory(offload, self.precision.device):
            return self.objective(batch)

    @property
    def token_budget(self) -> int | None:
        """Tokens of a micro-batch, as the governor has it now."""
        return self.governor.token_budget if self.governor is not None else None

    def _observe(self, gradient: Gradient) -> None:
        if self.governor is None or not gradient.micro_batches:
            return
        event = self.governor.observe(micro_batch_tokens=gradient.micro_batch_tokens)
        if event is not None:
            self.on_event({"step": self.state.step, **event})
        self.state.plan = self.governor.state_dict()
