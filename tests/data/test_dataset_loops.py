"""Other people's loops get the same samples: ranks and workers of any number, HF Trainer, Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.data import dataset as module
from llamahome.data.dataset import StreamingDataset
from llamahome.data.store import TokenStore, TokenStoreWriter

COUNT = 1100  # more than a window


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    """Document i has two or three tokens and begins with i."""
    with TokenStoreWriter(tmp_path_factory.mktemp("data") / "store", 5000) as writer:
        for i in range(COUNT):
            writer.append(np.full(2 + i % 2, i), np.ones(2 + i % 2, bool), i)
        return writer.commit()


class Worker(NamedTuple):
    """What torch tells a worker process about itself."""

    id: int
    num_workers: int


def read(dataset: StreamingDataset, workers: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First tokens of a rank's items as torch's DataLoader orders them: a batch from each worker in turn."""
    if workers == 0:
        return [int(item["input_ids"].flatten()[0]) for item in dataset]
    queues = []
    for worker in range(workers):
        with monkeypatch.context() as patch:
            patch.setattr(module, "get_worker_info", lambda worker=worker: Worker(worker, workers))
            state = dataset.state_dict()
            items = [int(item["input_ids"].flatten()[0]) for item in dataset]
            dataset.load_state_dict(state)  # each worker has a copy of its own
        size = dataset.batch_size
        queues.append([items[begin : begin + size] for begin in range(0, len(items), size)])
    rounds = range(max(map(len, queues)))
    return [item for i in rounds for queue in queues for item in (queue[i] if i < len(queue) else [])]


@pytest.fixture(scope="module")
def patching():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@settings(max_examples=50, deadline=None)
@given(
    ranks=st.integers(1, 8),
    workers=st.integers(0, 4),
    batch_size=st.integers(1, 7),
    rows=st.sampled_from(["samples", "packed", "fixed"]),
    block=st.sampled_from([0, 16, 1024]),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 5),
)
def test_every_item_comes_once_and_at_its_step(store, patching, ranks, workers, batch_size, rows, block, seed, epoch):
    def dataset(rank: int = 0, world_size: int = 1) -> StreamingDataset:
        made = StreamingDataset(
            store, rows=rows, length=7, seed=seed, block=block, rank=rank, world_size=world_size, batch_size=batch_size
        )
        made.set_epoch(epoch)
        return made

    alone = read(dataset(), 0, patching)
    parts = [read(dataset(rank, ranks), workers, patching) for rank in range(ranks)]
    assert [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)] == alone
    if rows == "samples":
        assert sorted(alone) == list(range(COUNT))


class Recorder(torch.nn.Module):
    """A model that notes the samples it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        assert torch.equal(labels[:, 1], input_ids[:, 1])
        self.seen += input_ids[:, 0].tolist()
        return {"loss": (self.weight - 1) ** 2}


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([item[name][:2] for item in items]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_of_hugging_face_reads_it(store: TokenStore, tmp_path: Path, workers: int) -> None:
    from transformers import Trainer, TrainingArguments

    expected = [int(item["input_ids"][0]) for item in StreamingDataset(store, seed=5)]
    model = Recorder()
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        dataloader_num_workers=workers, save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    dataset = StreamingDataset(store, seed=5, batch_size=4)
    Trainer(model, options, train_dataset=dataset, data_collator=collate).train()
    assert model.seen == expected[:120]


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_reads_it(store: TokenStore, tmp_path: Path, workers: int) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Recorder()

        def training_step(self, batch: dict[str, torch.Tensor], _number: int) -> torch.Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    expected = [int(item["input_ids"][0]) for item in StreamingDataset(store, seed=5)]
    loader = StreamingDataset(store, seed=5).loader(4, num_workers=workers, collate_fn=collate)
    found = Module()
    trainer = lightning.Trainer(
        max_steps=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(found, loader)
    assert found.model.seen == expected[:120]
    assert loader.dataset.state_dict()["position"] == 120
