"""The objective equals transformers' own loss, and proves what it assumes about a model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llamahome.data.batch import BatchProcessor
from llamahome.errors import ConfigError, ModelError
from llamahome.training.objective import Objective, build_objective, flat_row, respects_boundaries


def _their_loss(model, ids, labels):
    """Summed loss of one sample by the model's own forward pass, without packing."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    return F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("attention", ["llamahome", "sdpa", "eager"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_packed_row_gives_the_sum_of_its_samples(make_model, store, attention, method):
    model = make_model(torch.float64, attention, **{"training.method": method}).double()
    objective, processor = build_objective(model), BatchProcessor(store)
    parameters = [p for p in model.parameters() if p.requires_grad]
    packed = objective(processor.build([3, 0, 7, 21]))
    gradients = torch.autograd.grad(packed, parameters)
    alone = 0
    for i in (3, 0, 7, 21):
        batch = processor.build([i])
        alone = alone + _their_loss(model, batch.input_ids, batch.labels)
    # transformers' eager attention takes its softmax in fp32 whatever the model's type.
    bound = 1e-6 if attention == "eager" else 1e-10
    torch.testing.assert_close(packed, alone, rtol=bound, atol=bound)
    for ours, theirs in zip(gradients, torch.autograd.grad(alone, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e3 * bound, atol=10 * bound)


def test_a_changed_sample_leaves_every_bit_of_the_others_hidden_states(make_model):
    objective = build_objective(make_model())
    first, second, third = [5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]
    before, _ = objective.trained_hidden(flat_row([first, second, third]))
    after, _ = objective.trained_hidden(flat_row([first, [3, 3, 3], third]))
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[3:5], after[3:5])


def test_statistics_count_the_hits(make_model, store):
    objective, batch = build_objective(make_model()), BatchProcessor(store).build([1, 2, 3])
    with torch.no_grad():
        loss, correct = objective.statistics(batch)
        hidden, labels = objective.trained_hidden(batch)
    logits = hidden @ objective.head.weight.T
    assert int(correct) == int((logits.argmax(-1) == labels).sum())
    torch.testing.assert_close(loss, objective(batch))


def test_boundaries_are_respected_by_attention_and_their_absence_is_seen(make_model):
    model = make_model()
    assert respects_boundaries(build_objective(model))
    model.get_base_model().config._attn_implementation = "sdpa"
    objective = build_objective(model)
    blind = flat_row([[1]])

    def without_boundaries(samples):
        row = flat_row(samples)
        return type(blind)(
            row.input_ids, row.labels, torch.arange(row.num_tokens)[None], row.cu_seqlens, row.lengths, row.sample_ids,
            row.num_tokens, row.num_trained,
        )  # fmt: skip

    assert not respects_boundaries(objective, without_boundaries)


def test_a_model_that_changes_its_logits_is_refused(make_model):
    model = make_model()
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: output * 3)
    with pytest.raises(ModelError, match="changes its logits"):
        build_objective(model)


def test_an_adapter_on_the_output_projection_is_refused(make_model):
    model = make_model(**{"lora.target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ConfigError, match="output projection"):
        build_objective(model)


def test_a_loss_of_the_users_own_gets_trained_tokens_only(make_model, store, tmp_path, monkeypatch):
    (tmp_path / "own_loss.py").write_text(
        "seen = []\n"
        "def loss(hidden, weight, labels, *, bias, logit_scale, softcap, reduction):\n"
        "    seen.append((tuple(hidden.shape), tuple(labels.shape), reduction))\n"
        "    return (hidden.float() @ weight.float().T).logsumexp(-1).sum()\n"
    )
    monkeypatch.chdir(tmp_path)
    batch = BatchProcessor(store).build([1, 2])
    objective = build_objective(make_model(), "own_loss:loss")
    objective(batch).backward()
    import sys

    assert sys.modules["own_loss"].seen == [((batch.num_trained, 64), (batch.num_trained,), "sum")]


def test_gradient_checkpointing_changes_no_bit(make_model, store):
    from llamahome.model.adapters import enable_checkpointing

    batch = BatchProcessor(store).build([1, 2, 3])
    results = []
    for checkpointing in (False, True):
        model = make_model()
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        Objective(model)(batch).backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("samples", [[3, 0, 7, 21], [1]])
def test_a_row_filled_up_to_its_size_gives_the_same_loss_and_gradient(make_model, store, samples):
    model = make_model().double()
    objective = build_objective(model)
    assert objective.rounds_rows
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for processor in (BatchProcessor(store), BatchProcessor(store, round_rows=True)):
        batch = processor.build(samples)
        loss = objective(batch)
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    assert batch.input_ids.shape[1] % 8 == 0
    assert batch.input_ids.shape[1] > batch.num_tokens == int(batch.cu_seqlens[-1])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
