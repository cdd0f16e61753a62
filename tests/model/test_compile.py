"""Decoder layers compile without a break, give the same numbers, and a compiler that fails is survived."""

from __future__ import annotations

import logging

import pytest
import torch

from llamahome.config import Config
from llamahome.model.adapters import apply_adapter
from llamahome.model.compile import compile_layers, decoder_layers
from llamahome.model.load import load_model, resolve_model
from llamahome.training.objective import build_objective, flat_row


@pytest.fixture
def objective(tiny_model_dir):
    config = Config.load(None, {"model.name": str(tiny_model_dir), "lora.rank": 4})
    source = resolve_model(None, config.model)
    model = load_model(source, dtype=torch.float32, device="cpu", attention="llamahome")
    return build_objective(apply_adapter(model, config).train())


def _loss_and_gradient(objective, samples):
    objective.model.zero_grad()
    loss = objective(flat_row(samples))
    loss.backward()
    return [loss, *(p.grad.clone() for p in objective.model.parameters() if p.requires_grad)]


SAMPLES = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]


def test_a_layer_has_no_graph_break(objective):
    expected = _loss_and_gradient(objective, SAMPLES)
    objective.causal.enable_input_require_grads()
    for layer in decoder_layers(objective.causal):
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for samples in (SAMPLES, SAMPLES[:2]):
        found = _loss_and_gradient(objective, samples)
        if samples is SAMPLES:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers(objective):
    expected = _loss_and_gradient(objective, SAMPLES)
    assert compile_layers(objective.causal, "default", tokens=0, trial=lambda tokens: None) == "default"
    torch.testing.assert_close(_loss_and_gradient(objective, SAMPLES), expected, rtol=1e-4, atol=1e-5)


def test_auto_does_not_compile_a_short_run(objective):
    assert compile_layers(objective.causal, "auto", tokens=1000, trial=lambda tokens: None) == "none"
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(objective.causal))


def test_a_mode_for_gpus_is_replaced_on_a_cpu(objective, caplog):
    caplog.set_level(logging.INFO, "llamahome")
    assert compile_layers(objective.causal, "reduce-overhead", tokens=0, trial=lambda tokens: None) == "default"
    assert "reduce-overhead is for GPUs" in caplog.text
