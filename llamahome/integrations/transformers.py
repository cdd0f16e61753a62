"""The engine's parts in Hugging Face's Trainer, and in those built on it: data, loss, memory governor, metrics.

model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=use_attention())
fuse(model), fuse_loss(model)
Trainer(model, args, train_dataset=StreamingDataset(store), data_collator=FlatCollator(), callbacks=[...])
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from llamahome.errors import ConfigError
from llamahome.integrations.rows import FlatCollator
from llamahome.integrations.split import GovernedBatch
from llamahome.memory.governor import MemoryGovernor
from llamahome.memory.monitor import MemoryMonitor
from llamahome.model.attention import NAME, register
from llamahome.monitor.sinks import MetricSink
from llamahome.training.objective import Objective, build_objective

__all__ = ["FlatCollator", "GovernorCallback", "MetricsCallback", "fuse_loss", "use_attention"]

logger = logging.getLogger(__name__)


class GovernorCallback(TrainerCallback):  # type: ignore[misc]
    """Cuts each of a Trainer's batches to the governor's budget and replays one that ran out of memory.

        trainer = Trainer(model, args, train_dataset=data)
        trainer.add_callback(GovernorCallback(trainer, governor))
        trainer.train()

    Set `per_device_train_batch_size` as large as you like: it no longer costs memory. `auto_find_batch_size` shrinks
    the global batch, so leave it off. Only `trainer` itself is changed, until its training ends. Events are kept in
    `events` and go to Trainer's log.

    Raises: ConfigError for `auto_find_batch_size`, and for a loss that is a mean over each batch, which cannot be cut.
    """

    def __init__(self, trainer: Trainer, governor: MemoryGovernor) -> None:
        if trainer.args.auto_find_batch_size:
            raise ConfigError("it changes the global batch size", where="auto_find_batch_size", fix="set it to False")
        if not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None:
            raise ConfigError(
                f"the loss of {type(trainer.model).__name__} is a mean over its batch, which cannot be cut",
                where="Trainer", fix="give Trainer a compute_loss_func that divides by num_items_in_batch",
            )  # fmt: skip
        self.governor, self.trainer = governor, trainer
        self.events: list[dict[str, Any]] = []
        self._governed: GovernedBatch | None = None
        self._whole = trainer.training_step
        trainer.training_step = self._training_step

    def _training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Trainer's own `training_step` for each part. Raises: MemoryLimitError, ConfigError."""
        if num_items_in_batch is None:
            raise ConfigError("Trainer counts no trained tokens in these batches", where="labels",
                              fix="give each batch labels, -100 where a token is not trained")  # fmt: skip
        if self._governed is None:
            self._governed = GovernedBatch(self.governor, model.parameters(), on_event=self._event)
        return self._governed.run(
            inputs, lambda part: self._whole(model, part, num_items_in_batch), step=self.trainer.state.global_step + 1
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """The governor learns from the step's peak."""
        if self._governed is not None:
            self._governed.observe()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Give the Trainer its own method back."""
        self.trainer.__dict__.pop("training_step", None)

    def _event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        logger.info("%s", event)


def use_attention() -> str:
    """The name to give as `attn_implementation`: the engine's attention, which keeps the samples of a row apart."""
    register()
    return NAME


def fuse_loss(model: Any) -> Callable[[], None]:
    """While it trains, let `model` (of transformers, plain or in PEFT's wrapper) give its loss and no logits.

    The output projection is computed at the trained tokens only, a few rows at a time, together with the loss; the
    result is transformers' own: a sum over trained tokens, divided by `num_items_in_batch` or by their number.
    Evaluation and generation run the model's own code. TRL's trainers read logits, so leave it out there.

    Returns what takes it back. Raises: ModelError, ConfigError for models whose loss cannot be made so.
    """
    objective = build_objective(model)
    causal = objective.causal
    own = causal.forward

    @wraps(type(causal).forward)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None or not self.training or args:
            return own(*args, labels=labels, **kwargs)
        return CausalLMOutputWithPast(loss=_loss(objective, labels, kwargs))

    causal.forward = MethodType(forward, causal)

    def undo() -> None:
        causal.__dict__.pop("forward", None)

    return undo


def _loss(objective: Objective, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The mean over trained tokens of a batch, labels [B, T]."""
    items = kwargs.pop("num_items_in_batch", None)
    kwargs |= {"use_cache": False, "return_dict": True}
    kwargs.pop("logits_to_keep", None)
    hidden = objective.causal.base_model(**kwargs).last_hidden_state[:, :-1].flatten(0, 1)
    following = labels[:, 1:].flatten()
    rows = (following != -100).nonzero().squeeze(1)
    total = objective.loss(
        hidden.index_select(0, rows), objective.head.weight, following[rows], reduction="sum", **objective.projection
    )
    return total / (items if items is not None else max(1, len(rows)))


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Sends what a Trainer logs to sinks of the engine: metrics.jsonl, TensorBoard, trackers, the user's own.

        MetricsCallback([JsonlSink(folder / "metrics.jsonl")])

    A record has the engine's names: `step epoch loss learning_rate grad_norm step_seconds memory_bytes
    memory_peak_bytes`; an evaluation is an event. `step_seconds` is the mean since the record before.
    """

    def __init__(self, sinks: Iterable[MetricSink], monitor: MemoryMonitor | None = None) -> None:
        self.sinks = list(sinks)
        self._monitor = monitor or MemoryMonitor("cuda" if torch.cuda.is_available() else "cpu")
        self._last = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock starts."""
        self._last = (state.global_step, time.perf_counter())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: Mapping[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Writes a record of the step, or the event of an evaluation."""
        found = dict(logs or {})
        if "eval_loss" in found:
            for sink in self.sinks:
                sink.event({"event": "evaluation", "step": state.global_step, **found})
        if "loss" not in found:
            return
        step, now = state.global_step, time.perf_counter()
        reading = self._monitor.read()
        found |= {
            "step": step, "step_seconds": (now - self._last[1]) / max(1, step - self._last[0]),
            "memory_bytes": reading.used_bytes, "memory_peak_bytes": reading.peak_bytes,
        }  # fmt: skip
        self._last = (step, now)
        for sink in self.sinks:
            sink.write(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The sinks are closed."""
        for sink in self.sinks:
            sink.close()
