"""The memory governor in Lightning.

python examples/governed_lightning.py model_folder
"""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from transformers import AutoModelForCausalLM

import llamahome as lh
from llamahome.integrations.lightning import GovernorCallback


class Module(pl.LightningModule):
    """A language model whose backward passes are the governor's to cut."""

    def __init__(self, model_name: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> None:
        trained = (batch["labels"][:, 1:] != -100).sum()
        memory = next(c for c in self.trainer.callbacks if isinstance(c, GovernorCallback))
        loss = memory.run(self, batch, lambda part: self.model(**part, num_items_in_batch=trained).loss)
        self.losses.append(float(loss))
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(model_name: str) -> list[float]:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(32 * 24).reshape(32, 24) % 97]
    module = Module(model_name)
    plan = lh.plan_memory(module.model.config, method="full", precision="fp32", max_length=24)
    monitor = lh.MemoryMonitor()
    limit = int(0.9 * monitor.read().total_bytes)
    governor = lh.MemoryGovernor(limit, plan, monitor, longest_sample=24, step_tokens=192, maximum=64)
    trainer = pl.Trainer(
        max_steps=3, callbacks=[GovernorCallback(governor)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8))
    return module.losses


if __name__ == "__main__":
    main(sys.argv[1])
