"""Evaluation equals the definition, whatever the cut, and works on all that a run leaves."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import llamahome as lh
from llamahome.config import Config
from llamahome.data.batch import BatchProcessor
from llamahome.data.store import TokenStoreWriter
from llamahome.errors import DataError, ModelError
from llamahome.training.evaluate import evaluate_store
from llamahome.training.objective import build_objective
from llamahome.training.precision import Precision

FP32 = Precision("fp32", "cpu")


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_it_equals_the_definition(make_model, store, budget):
    model = make_model().double()
    found = evaluate_store(build_objective(model), store, precision=FP32, token_budget=budget)
    loss, correct, tokens = 0.0, 0, 0
    processor = BatchProcessor(store)
    for i in range(len(store)):
        batch = processor.build([i])
        labels = batch.labels[0, 1:]
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, use_cache=False).logits[0, :-1]
        loss += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        correct += int(((logits.argmax(-1) == labels) & (labels != -100)).sum())
        tokens += int((labels != -100).sum())
    assert found.loss == pytest.approx(loss / tokens, rel=1e-9)
    assert found.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-9)
    assert found.token_accuracy == correct / tokens
    assert (found.samples, found.trained_tokens) == (len(store), tokens)


def test_it_leaves_the_model_as_it_was(make_model, store):
    model = make_model(**{"lora.dropout": 0.5}).train()
    objective = build_objective(model)
    first = evaluate_store(objective, store, precision=FP32, token_budget=500)
    assert model.training
    assert evaluate_store(objective, store, precision=FP32, token_budget=500) == first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_takes_the_first_samples(make_model, store):
    objective = build_objective(make_model())
    part = evaluate_store(objective, store, precision=FP32, token_budget=500, max_samples=3)
    assert (part.samples, part.trained_tokens) == (3, int(store.trained_counts([0, 1, 2]).sum()))


def test_nothing_trained_is_an_error(make_model, tmp_path):
    with TokenStoreWriter(tmp_path / "empty", 512) as writer:
        writer.append([5, 6, 7], [False, False, False])
        empty = writer.commit()
    with pytest.raises(DataError, match="no trained token"):
        evaluate_store(build_objective(make_model()), empty, precision=FP32, token_budget=100)


def test_a_run_a_checkpoint_and_its_base_can_be_evaluated(settings, data_file, tiny_model_dir):
    result = lh.train(Config.load(None, {**settings, "optimization.learning_rate": 1e-2}))
    config = Config.load(None, {"processing.precision": "fp32"})
    base = lh.evaluate(tiny_model_dir, data_file, config)
    final = lh.evaluate(result.output / "final", data_file, config)
    checkpoint = lh.evaluate(result.output / "checkpoint-12", data_file, config)
    assert final.loss < base.loss
    assert checkpoint == final
    assert final.samples == 60


def test_a_folder_without_a_model_is_refused(tmp_path, data_file):
    with pytest.raises(ModelError):
        lh.evaluate(tmp_path, data_file)


def test_a_model_with_attention_of_its_own_is_evaluated(data_file, tiny_tokenizer, tmp_path):
    """GPT-Neo does not ask transformers' registry: `attention: auto` takes eager."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    folder = tmp_path / "gpt-neo"
    GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=512, hidden_size=32, num_layers=1, num_heads=2, attention_types=[[["global"], 1]])
    ).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    found = lh.evaluate(folder, data_file, Config.load(None, {"processing.precision": "fp32"}))
    assert found.samples == 60


def test_a_cut_that_runs_out_of_memory_is_halved(make_model, store):
    objective = build_objective(make_model())
    expected = evaluate_store(objective, store, precision=FP32, token_budget=1024)

    class Short:
        """An objective with memory for 100 tokens at a time."""

        def __getattr__(self, name):
            return getattr(objective, name)

        def statistics(self, batch):
            if batch.num_tokens > 100:
                raise MemoryError
            return objective.statistics(batch)

    found = evaluate_store(Short(), store, precision=FP32, token_budget=1024)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (found.samples, found.trained_tokens) == (expected.samples, expected.trained_tokens)
    assert found.token_accuracy == pytest.approx(expected.token_accuracy, abs=1e-9)
