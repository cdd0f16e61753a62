"""How a step is cut never changes its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.data.batch import BatchProcessor
from llamahome.data.dataset import StepOrder
from llamahome.training.objective import build_objective
from llamahome.training.step import StepBatches, accumulate, clip_gradients, seed_step


@pytest.fixture(scope="module")
def exact_model(make_model):
    return make_model().double()


@pytest.fixture(scope="module")
def whole_step(exact_model, store):
    """Outcome and gradient of the step in a single micro-batch."""
    return _gradients(exact_model, _batches(store), 100_000)


def _batches(store, max_samples=None):
    return StepBatches(store, StepOrder(len(store), 16, seed=3), BatchProcessor(store), max_samples)


def _gradients(model, batches, budget):
    objective = build_objective(model)
    samples = batches.order.samples(0)
    model.zero_grad()
    total = accumulate(
        objective, batches.cut(samples, budget), batches.processor.build, batches.trained_tokens(samples)
    )
    return total, [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("max_samples", [1, 2, 3, 4, 16])
def test_every_batch_size_gives_the_same_gradient(exact_model, whole_step, store, max_samples):
    whole, expected = whole_step
    assert whole.micro_batches == 1
    part, found = _gradients(exact_model, _batches(store, max_samples), None)
    assert part.micro_batches == -(-16 // max_samples)
    assert part.tokens == whole.tokens
    torch.testing.assert_close(part.loss, whole.loss, rtol=1e-12, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(budget=st.integers(1, 700))
def test_every_token_budget_gives_the_same_gradient(exact_model, whole_step, store, budget):
    _, expected = whole_step
    part, found = _gradients(exact_model, _batches(store), budget)
    longest = int(store.lengths().max())
    assert part.micro_batch_tokens <= max(budget, longest)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_step(exact_model, whole_step, store):
    batches, objective = _batches(store), build_objective(exact_model)
    samples = batches.order.samples(0)
    whole, _ = whole_step
    with torch.no_grad():
        one_by_one = sum(float(objective(batches.processor.build([i]))) for i in samples)
    assert float(whole.loss) == pytest.approx(one_by_one / store.trained_counts(samples).sum(), rel=1e-9)


def test_clipping_scales_to_the_norm_and_leaves_small_gradients_alone():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0])
    assert float(clip_gradients(parameters, None)) == 5
    assert float(clip_gradients(parameters, 10.0)) == 5
    assert parameters[1].grad.tolist() == [0, 4.0]
    assert float(clip_gradients(parameters, 1.0)) == 5
    assert parameters[1].grad.tolist() == pytest.approx([0, 0.8], rel=1e-5)


def test_one_infinite_gradient_does_not_spread():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([float("inf"), 0]), torch.tensor([1.0, 2.0])
    assert not torch.isfinite(clip_gradients(parameters, 1.0))
    assert parameters[1].grad.tolist() == [1.0, 2.0]


def test_a_steps_random_numbers_follow_from_seed_and_step():
    def draw(seed, step):
        seed_step(seed, step)
        return torch.rand(3).tolist()

    assert draw(1, 5) == draw(1, 5)
    assert len({tuple(draw(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_dropout_is_replayed_by_a_replayed_step(make_model, store):
    model, batches = make_model(**{"lora.dropout": 0.3}), _batches(store)
    model.train()
    results = []
    for _ in range(2):
        seed_step(0, 4)
        results.append(_gradients(model, batches, 200)[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert any(np.any(g.numpy() != 0) for g in results[0])


def test_adapters_without_input_copies_give_the_same_gradient_under_autocast(make_model, store):
    from llamahome.model.adapters import without_input_casts
    from llamahome.training.precision import Precision

    precision, batch = Precision("bf16", "cpu"), BatchProcessor(store).build([1, 2, 3])
    results = []
    for active in (False, True):
        model = make_model(torch.bfloat16)
        objective = build_objective(model)
        with without_input_casts(model, active):
            with precision.autocast():
                loss = objective(batch)
            loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, plain in zip(*results, strict=True):
        assert ((ours - plain).norm() / plain.norm()).item() < 0.02
