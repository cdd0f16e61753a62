"""The governor in Hugging Face's Trainer: its batches are cut to fit, and the global batch size stays what it was."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llamahome.errors import ConfigError
from llamahome.integrations.split import GovernedBatch
from llamahome.memory.governor import MemoryGovernor

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
