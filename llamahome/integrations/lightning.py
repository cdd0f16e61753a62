"""The engine's data in Lightning, and its governor for modules with manual optimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from llamahome.data.dataset import StreamingDataset
from llamahome.integrations.rows import FlatCollator
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


class DataModule(pl.LightningDataModule):
    """Flat rows of `batch_size` samples from token stores, as `FlatCollator` gives them; the position is resumable.

        trainer.fit(module, DataModule(StreamingDataset(store), batch_size=8))

    Lightning keeps `state_dict` in its checkpoints, so a run that is resumed goes on within the epoch. On several ranks
    give the dataset its `rank` and `world_size`, and set `use_distributed_sampler=False`.
    """

    def __init__(
        self, train: StreamingDataset, *, validation: StreamingDataset | None = None, batch_size: int = 8,
        **options: Any,
    ) -> None:  # fmt: skip
        """`options` go to torch's DataLoader."""
        super().__init__()
        self.train, self.validation = train, validation
        self.batch_size, self.options = batch_size, options

    def train_dataloader(self) -> DataLoader[Any]:
        return self.train.loader(self.batch_size, collate_fn=FlatCollator(), **self.options)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self.validation is None:
            return []
        return self.validation.loader(self.batch_size, collate_fn=FlatCollator(), **self.options)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data."""
        return dict(self.train.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: CheckpointError when the position belongs to other data."""
        self.train.load_state_dict(state_dict)
