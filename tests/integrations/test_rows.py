"""The engine's rows, loss and layers in transformers' models give the numbers of padded batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llamahome.config import Config
from llamahome.data.dataset import StreamingDataset
from llamahome.data.prepare import prepare
from llamahome.errors import ModelError
from llamahome.integrations.rows import FlatCollator, as_datasets
from llamahome.model.fuse import fuse

ROWS = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}." + " Yes." * (i % 4)} for i in range(24)]


@pytest.fixture(scope="module")
def store(tiny_tokenizer: Any) -> Any:
    return prepare(ROWS, tiny_tokenizer, config=Config.load(None, {"data.validation_split": 0.0})).train


def load(folder: Path, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from torch.nn.utils.rnn import pad_sequence

    items = [{name: torch.as_tensor(values) for name, values in item.items()} for item in items]
    ids = pad_sequence([item["input_ids"] for item in items], batch_first=True)
    labels = pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-100)
    mask = pad_sequence([torch.ones_like(item["input_ids"]) for item in items], batch_first=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def test_a_flat_row_has_the_samples_end_to_end(store: Any) -> None:
    items = [item for item, _ in zip(StreamingDataset(store), range(5), strict=False)]
    row = FlatCollator()(items)
    bounds = row["cu_seq_lens_q"].tolist()
    assert bounds[0] == 0
    assert row["input_ids"].shape == row["labels"].shape == row["position_ids"].shape == (1, bounds[-1])
    for item, begin, end in zip(items, bounds, bounds[1:], strict=False):
        assert torch.equal(row["input_ids"][0, begin:end], item["input_ids"])
        assert torch.equal(row["labels"][0, begin + 1 : end], item["labels"][1:])
        assert row["labels"][0, begin] == -100
        assert row["position_ids"][0, begin:end].tolist() == list(range(end - begin))
    assert row["max_length_q"] == max(len(item["input_ids"]) for item in items)


def test_packed_rows_and_plain_lists_are_taken_too(store: Any) -> None:
    packed = next(iter(StreamingDataset(store, rows="packed", length=128)))
    row = FlatCollator()([packed])
    assert torch.equal(row["cu_seq_lens_q"], packed["cu_seqlens"])
    lists = FlatCollator()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}])
    assert lists["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert lists["cu_seq_lens_k"].tolist() == [0, 3, 5]


@pytest.mark.parametrize("adapter", [False, True])
def test_flat_row_fused_layers_and_loss_give_the_padded_batchs_gradient(
    store: Any, tiny_model_dir: Path, adapter: bool
) -> None:
    from peft import LoraConfig, get_peft_model

    from llamahome.integrations.transformers import fuse_loss, use_attention

    items = [item for item, _ in zip(StreamingDataset(store), range(6), strict=False)]
    found = []
    for ours in (False, True):
        model = load(tiny_model_dir, use_attention() if ours else "sdpa")
        if adapter:
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.train()
        if ours:
            fuse(model)
            undo = fuse_loss(model)
        batch = FlatCollator()(items) if ours else padded(items)
        output = model(**batch, num_items_in_batch=torch.tensor(37))
        output.loss.backward()
        found.append((output.loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        assert ours == (output.logits is None)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    assert len(found[0][1]) == len(found[1][1]) > 4
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)
    undo()
    assert model(**FlatCollator()(items)).logits is not None


def test_evaluation_keeps_its_logits(store: Any, tiny_model_dir: Path) -> None:
    from llamahome.integrations.transformers import fuse_loss

    model = load(tiny_model_dir, "sdpa")
    fuse_loss(model)
    batch = padded([item for item, _ in zip(StreamingDataset(store), range(3), strict=False)])
    training = model.train()(**batch).loss
    output = model.eval()(**batch)
    assert output.logits.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(training, output.loss, rtol=1e-5, atol=0)


def test_trainer_gives_the_same_curve_on_flat_rows(store: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Hugging Face's Trainer with our data, layers, loss and sink, beside itself on padded batches."""
    from transformers import Trainer, TrainingArguments

    from llamahome.integrations.transformers import MetricsCallback, fuse_loss, use_attention
    from llamahome.monitor.sinks import JsonlSink

    def train(ours: bool) -> list[float]:
        model = load(tiny_model_dir, use_attention() if ours else "sdpa")
        if ours:
            fuse(model)
            fuse_loss(model)
        arguments = TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=6,
            learning_rate=1e-3, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1,
            accelerator_config={"dispatch_batches": False},
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=StreamingDataset(store, seed=3),
            data_collator=FlatCollator() if ours else padded,
            callbacks=[MetricsCallback([JsonlSink(tmp_path / "metrics.jsonl")])] if ours else [],
        )  # fmt: skip
        trainer.train()
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]

    expected = train(False)
    assert train(True) == pytest.approx(expected, rel=1e-4)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=1e-4)
    assert all(record["step_seconds"] > 0 and record["memory_bytes"] > 0 for record in records)


def test_bounds_that_a_dispatcher_cut_off_are_an_error(store: Any, tiny_model_dir: Path) -> None:
    from llamahome.integrations.transformers import use_attention

    row = FlatCollator()([item for item, _ in zip(StreamingDataset(store), range(3), strict=False)])
    row["cu_seq_lens_q"] = row["cu_seq_lens_q"][:1]
    with pytest.raises(ModelError, match="dispatch_batches"):
        load(tiny_model_dir, use_attention())(**row)


@pytest.mark.slow
def test_trl_trains_on_our_rows_and_layers(
    store: Any, tiny_model_dir: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """TRL's SFTTrainer, unmodified: the same curve on padded batches of its own and on ours."""
    trl = pytest.importorskip("trl")
    from llamahome.integrations.transformers import use_attention

    def train(ours: bool) -> list[float]:
        model = load(tiny_model_dir, use_attention() if ours else "sdpa")
        if ours:
            assert fuse(model).swapped
        arguments = trl.SFTConfig(
            str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-3, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1, bf16=False,
            gradient_checkpointing=False, accelerator_config={"dispatch_batches": False},
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=as_datasets(StreamingDataset(store, seed=3)),
            processing_class=tiny_tokenizer, data_collator=FlatCollator() if ours else padded,
        )  # fmt: skip
        trainer.train()
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]

    assert train(True) == pytest.approx(train(False), rel=1e-4)


@pytest.mark.slow
def test_lightning_trains_on_our_rows_and_resumes_within_the_epoch(
    store: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from llamahome.integrations.lightning import DataModule
    from llamahome.integrations.transformers import fuse_loss, use_attention

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = load(tiny_model_dir, use_attention())
            fuse(self.model)
            fuse_loss(self.model)
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, Any], _index: int) -> torch.Tensor:
            loss = self.model.train()(**batch).loss
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def fit(steps: int, checkpoint: Path | None = None) -> tuple[Any, Any]:
        module, trainer = Module(), pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        data = DataModule(StreamingDataset(store, seed=3), batch_size=4)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
        return module, trainer

    whole, _ = fit(6)
    first, trainer = fit(3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    rest, _ = fit(6, tmp_path / "three.ckpt")
    assert first.losses + rest.losses == whole.losses
