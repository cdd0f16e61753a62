"""A batch run in parts, with and without failures, gives the gradient of the whole batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llamahome.errors import ConfigError, MemoryLimitError
from llamahome.integrations.split import GovernedBatch, split_rows
from llamahome.memory.governor import MemoryGovernor
from llamahome.memory.monitor import MemoryReading
from llamahome.memory.plan import plan_memory

GB = 10**9


class Roomy:
    """A host where memory never changes."""

    device = "cpu"

    def read(self) -> MemoryReading:
        return MemoryReading(GB, GB, 64 * GB, 63 * GB)

    def reset_peak(self) -> bool:
        return True


def governor(maximum: int, longest: int = 16) -> MemoryGovernor:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
    return MemoryGovernor(8 * GB, plan_memory(config), Roomy(), longest_sample=longest, step_tokens=4096,  # type: ignore[arg-type]
                          minimum=longest, maximum=maximum, release=lambda: None)  # fmt: skip


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)


def batch_of(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 512, (rows, 16), generator=torch.Generator().manual_seed(seed))
    labels = ids.masked_fill(torch.arange(16) < torch.arange(rows)[:, None] % 9, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def backward_of(model: Any, batch: dict[str, torch.Tensor], fails: Any = lambda: False, always: int = 1) -> Any:
    trained = (batch["labels"][:, 1:] != -100).sum()

    def backward(part: dict[str, Any]) -> torch.Tensor:
        logits = model(input_ids=part["input_ids"]).logits[:, :-1].flatten(0, 1)  # transformers' loss is fp32
        loss = torch.nn.functional.cross_entropy(logits, part["labels"][:, 1:].flatten(), reduction="sum") / trained
        if len(part["input_ids"]) > always and fails():
            # As backward does: some gradients are there already.
            next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
        loss.backward()
        return loss

    return backward


@pytest.mark.parametrize("maximum", [16, 48, 1024])
@pytest.mark.parametrize("failing", [0.0, 0.5])
def test_parts_and_failures_change_nothing(model: Any, maximum: int, failing: float) -> None:
    """Two batches accumulate; a failure drops the failed batch's gradient and keeps the earlier one's.

    A single row always fits: where it does not, no cut can help.
    """
    batches = [batch_of(11, seed) for seed in range(2)]
    expected = [float(backward_of(model, batch)(batch).detach()) for batch in batches]
    whole = gradients(model)
    model.zero_grad()
    chance = random.Random(3)
    events: list[dict[str, Any]] = []
    governed = GovernedBatch(governor(maximum), model.parameters(), on_event=events.append)
    found = [float(governed.run(b, backward_of(model, b, lambda: chance.random() < failing))) for b in batches]
    assert found == pytest.approx(expected, rel=1e-12)
    for ours, theirs in zip(gradients(model), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    failures = sum(event["event"] == "oom" for event in events)
    assert failures == 0 if failing == 0 or maximum == 16 else failures > 0


def test_a_row_that_never_fits_ends_with_the_limit(model: Any) -> None:
    batch = batch_of(4)
    governed = GovernedBatch(governor(64), model.parameters())
    with pytest.raises(MemoryLimitError):
        governed.run(batch, backward_of(model, batch, lambda: True, always=0))


def test_other_errors_are_not_tried_again(model: Any) -> None:
    calls = []

    def backward(part: dict[str, Any]) -> torch.Tensor:
        calls.append(part)
        raise ValueError("a fault of the loop")

    with pytest.raises(ValueError, match="a fault of the loop"):
        GovernedBatch(governor(64), model.parameters()).run(batch_of(4), backward)
    assert len(calls) == 1


def test_rows_are_cut_within_the_budget_and_none_is_lost() -> None:
    batch = {**batch_of(7), "note": "goes along", "scale": torch.tensor(2.0)}
    parts = list(split_rows(batch, 40))
    assert [part["input_ids"].shape[0] for part in parts] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), batch["labels"])
    assert all(part["note"] == "goes along" and part["scale"] == 2 for part in parts)
    assert [part["input_ids"].shape[0] for part in split_rows(batch, 3)] == [1] * 7


def test_trainer_learns_the_same_with_the_governor(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Hugging Face's Trainer on the same data, once whole and once cut, with failures, to the same weights."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from llamahome.integrations.transformers import GovernorCallback

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 512, (24, 16))]

    def train(governed: bool) -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        arguments = TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3,
            learning_rate=1e-3, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        callback = None
        if governed:
            chance, whole = random.Random(1), trainer.training_step

            def sometimes(*args: Any, **kwargs: Any) -> torch.Tensor:
                if len(args[1]["input_ids"]) > 1 and chance.random() < 0.5:
                    raise MemoryError
                return whole(*args, **kwargs)

            trainer.training_step = sometimes  # type: ignore[method-assign]
            callback = GovernorCallback(trainer, governor(32))
            trainer.add_callback(callback)
        trainer.train()
        return model, callback

    plain, _ = train(False)
    cut, callback = train(True)
    assert [e["event"] for e in callback.events].count("oom") >= 1
    assert "training_step" not in vars(callback.trainer)
    for ours, theirs in zip(cut.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_trainers_own_search_for_a_batch_size_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from llamahome.integrations.transformers import GovernorCallback

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", auto_find_batch_size=True)
    with pytest.raises(ConfigError, match="global batch size"):
        GovernorCallback(Trainer(model, arguments), governor(32))
