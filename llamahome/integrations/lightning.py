"""The governor in Lightning, for modules with manual optimization: only they decide what a backward pass is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from llamahome.integrations.split import Batch, GovernedBatch
from llamahome.memory.governor import MemoryGovernor


class GovernorCallback(pl.Callback):
    """Cuts batches to the governor's budget and replays one that ran out of memory.

        class Module(pl.LightningModule):
            automatic_optimization = False

            def training_step(self, batch, index):
                trained = (batch["labels"][:, 1:] != -100).sum()
                loss = memory.run(self, batch, lambda part: self.summed_loss(part) / trained)
                self.optimizers().step()
                self.optimizers().zero_grad()

        memory = GovernorCallback(governor)
        pl.Trainer(callbacks=[memory]).fit(Module(), data)

    `events` holds each out-of-memory and each change of the cut.
    """

    def __init__(self, governor: MemoryGovernor) -> None:
        self.governor = governor
        self.events: list[dict[str, Any]] = []
        self._governed: GovernedBatch | None = None

    def run(self, module: pl.LightningModule, batch: Batch, loss_of: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """Forward and `manual_backward` over the parts of `batch`; returns the sum of their losses.

        `loss_of` divides by the whole batch's trained tokens. Raises: MemoryLimitError when one row does not fit.
        """
        if self._governed is None:
            self._governed = GovernedBatch(self.governor, module.parameters(), on_event=self.events.append)

        def backward(part: dict[str, Any]) -> Tensor:
            loss = loss_of(part)
            module.manual_backward(loss)
            return loss

        return self._governed.run(batch, backward, step=module.global_step + 1)

    def on_train_batch_end(self, *arguments: Any, **options: Any) -> None:
        """The governor learns from the step's peak."""
        if self._governed is not None:
            self._governed.observe()
