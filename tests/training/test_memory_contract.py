"""The cut is a memory decision: failures, changing limits and probes leave losses and the adapter as they were."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from llamahome.data.batch import BatchProcessor
from llamahome.data.dataset import StepOrder
from llamahome.memory.governor import MemoryGovernor
from llamahome.memory.monitor import MemoryReading
from llamahome.memory.plan import plan_memory
from llamahome.training.calibrate import calibrate
from llamahome.training.checkpoint import TrainingState
from llamahome.training.loop import TrainingLoop
from llamahome.training.step import StepBatches

GB = 10**9
PLAN = plan_memory(
    {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
     "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}, precision="fp32",
)  # fmt: skip


class Machine:
    """A process that needs what the plan says, on a host of 64 GB."""

    device = "cpu"
    tokens = 64

    def read(self) -> MemoryReading:
        return MemoryReading(PLAN.fixed_bytes, PLAN.at(self.tokens).total, 64 * GB, 60 * GB)

    def reset_peak(self) -> bool:
        return True


def governed(limit: int, store: Any) -> MemoryGovernor:
    longest = int(store.lengths().max())
    return MemoryGovernor(limit, PLAN, Machine(), longest_sample=longest, step_tokens=2048,  # type: ignore[arg-type]
                          release=lambda: None)  # fmt: skip


def loop_of(
    model: Any, store: Any, max_samples: int | None = None, governor: MemoryGovernor | None = None, steps: int = 4
) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batches = StepBatches(store, StepOrder(len(store), 16, seed=3), BatchProcessor(store), max_samples)
    return TrainingLoop(model, optimizer, batches, state=TrainingState(samples_per_step=16, total_steps=steps),
                        governor=governor)  # fmt: skip


def outcome(loop: Any) -> tuple[list[float], list[torch.Tensor]]:
    losses = [record["loss"] for record in loop]
    return losses, [p.detach().clone() for p in loop.model.parameters() if p.requires_grad]


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-6


@pytest.fixture(scope="module")
def whole(make_model: Any, store: Any) -> Any:
    return outcome(loop_of(make_model(), store))


@pytest.mark.parametrize("max_samples", [1, 2, 3, 5, 8, 16])
def test_every_cut_trains_the_same(make_model: Any, store: Any, whole: Any, max_samples: int) -> None:
    assert_same(outcome(loop_of(make_model(), store, max_samples)), whole)


@pytest.mark.parametrize("seed", range(4))
def test_failures_and_a_changing_limit_train_the_same(make_model: Any, store: Any, whole: Any, seed: int) -> None:
    """A fifth of all micro-batches fail, forward or backward, unless they are the smallest; the limit moves."""
    found, events = with_failures(make_model(), store, seed)
    assert_same(found, whole)
    assert any(event["event"] == "oom" for event in events)
    assert any(event["event"] == "cut_changed" for event in events)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"training.method": "qlora"}, {"training.method": "qlora", "lora.use_dora": True},
        {"training.method": "qat"}, {"training.method": "qat", "qat.lora": True},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)  # fmt: skip
def test_failures_on_rounded_weights_train_the_same(make_model: Any, store: Any, settings: dict[str, Any]) -> None:
    """QAT for one step: another cut differs in a last bit, which decides how some of the next step's weights round."""
    steps = 1 if settings["training.method"] == "qat" else 4
    found, events = with_failures(make_model(**settings), store, seed=1, steps=steps)  # whose first step fails
    assert any(event["event"] == "oom" for event in events)
    assert_same(found, outcome(loop_of(make_model(**settings), store, steps=steps)))


def with_failures(model: Any, store: Any, seed: int, steps: int = 4) -> tuple[Any, list[dict[str, Any]]]:
    governor, chance = governed(8 * GB, store), random.Random(seed)
    loop = loop_of(model, store, governor=governor, steps=steps)
    events: list[dict[str, Any]] = []
    loop.on_event = events.append
    objective = loop.objective

    def failing(batch: Any) -> torch.Tensor:
        loss = objective(batch)
        if batch.num_tokens > 64 and chance.random() < 0.2:
            if chance.random() < 0.5:
                loss.backward()  # as when it fails late in backward: gradients are there that must go
            raise chance.choice([MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")])
        return loss

    loop.objective = failing
    losses = []
    for record in loop:
        losses.append(record["loss"])
        governor.limit_bytes = PLAN.at(chance.choice([100, 300, 2000])).total
    trained = [p.detach().clone() for p in loop.model.parameters() if p.requires_grad]
    return (losses, trained), events


def test_probes_train_nothing_and_are_recorded(make_model: Any, store: Any, whole: Any) -> None:
    limit = int(PLAN.at(400).total / 0.94)
    loop = loop_of(make_model(), store, governor=governed(limit, store))
    events = [event for event in calibrate(loop) if event["event"] == "calibrated"]
    assert events[0]["tokens"] == int(store.lengths().max())
    assert events[1]["tokens"] > 200
    assert all(event["predicted"] > 0 and event["measured"] > 0 for event in events)
    assert all(p.grad is None for p in loop.model.parameters())
    assert_same(outcome(loop), whole)


def test_a_probe_that_fails_makes_the_cut_smaller(make_model: Any, store: Any) -> None:
    governor = governed(int(PLAN.at(400).total / 0.94), store)
    loop, before = loop_of(make_model(), store, governor=governor), governor.token_budget
    objective = loop.objective

    def failing(batch: Any) -> torch.Tensor:
        if batch.num_tokens > 100:
            raise MemoryError
        return objective(batch)

    loop.objective = failing
    assert "oom" in [event["event"] for event in calibrate(loop)]
    assert governor.token_budget < before


def test_there_is_no_probe_where_memory_is_plenty(make_model: Any, store: Any) -> None:
    assert list(calibrate(loop_of(make_model(), store, governor=governed(40 * GB, store)))) == []


def test_activations_that_are_moved_away_give_the_same_gradients(make_model: Any, store: Any, whole: Any) -> None:
    """On a CPU they only move to other memory of it, by the same code."""
    governor = governed(8 * GB, store)
    governor.plan = replace(governor.plan, offload=True)
    loop, moved = loop_of(make_model(), store, governor=governor), []
    save = torch.autograd.graph.save_on_cpu.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        moved.append(1)
        save(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph.save_on_cpu, "__init__", counted)
        assert_same(outcome(loop), whole)
    assert moved
