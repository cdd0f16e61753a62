"""Decoder layers compile without a break, give the same numbers, and a compiler that fails is survived."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from llamahome.config import Config
from llamahome.kernels.lora import TRACED_BY_RUNNING
from llamahome.model import compile as compile_module
from llamahome.model.adapters import apply_adapter, enable_checkpointing
from llamahome.model.compile import compile_layers, decoder_layers
from llamahome.model.fuse import fuse
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


@pytest.mark.parametrize(
    ("fused", "recomputed"),
    [(False, 0), (True, 0), *[pytest.param(fused, 1, marks=pytest.mark.slow) for fused in (False, True)]],
)
def test_a_layer_has_no_graph_break_and_new_lengths_compile_nothing(objective, fused, recomputed):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    expected = _loss_and_gradient(objective, SAMPLES)
    if recomputed:
        enable_checkpointing(objective.model, recomputed)
    if fused:
        fuse(objective.model)
        for function in TRACED_BY_RUNNING:
            torch.compiler.allow_in_graph(function)
    objective.causal.enable_input_require_grads()
    for layer in decoder_layers(objective.causal):
        layer.compile(backend=counter, fullgraph=True, dynamic=True)
    compiled = []
    for samples in (SAMPLES, SAMPLES[:2], SAMPLES[1:], SAMPLES * 2):
        found = _loss_and_gradient(objective, samples)
        if samples is SAMPLES:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        compiled.append(counter.frame_count)
    assert compiled[1:] == compiled[1:2] * 3


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_inductor_gives_the_same_numbers(objective, fused):
    expected = _loss_and_gradient(objective, SAMPLES)
    if fused:
        fuse(objective.model)
    assert compile_layers(objective.causal, "default", tokens=0, trial=lambda tokens: None) == "default"
    torch.testing.assert_close(_loss_and_gradient(objective, SAMPLES), expected, rtol=1e-4, atol=1e-5)


def test_auto_does_not_compile_a_short_run(objective):
    assert compile_layers(objective.causal, "auto", tokens=1000, trial=lambda tokens: None) == "none"
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(objective.causal))


@pytest.mark.parametrize(
    ("plain", "compiled", "expected"), [(10.0, 8.0, "default"), (10.0, 12.0, "none"), (1e-4, None, "none")]
)
def test_auto_stays_with_what_a_trial_found_faster(objective, monkeypatch, plain, compiled, expected):
    """The third run is so fast that compiling would not pay: nothing is tried."""
    seconds = iter([plain, compiled])
    monkeypatch.setattr(compile_module, "_seconds", lambda trial: next(seconds))
    monkeypatch.setattr(compile_module, "compiler_works", lambda: True)
    tried = []
    assert compile_layers(objective.causal, "auto", tokens=1_000_000, trial=tried.append) == expected
    assert bool(tried) == (compiled is not None)
    in_force = [layer._compiled_call_impl is not None for layer in decoder_layers(objective.causal)]
    assert in_force == [expected == "default"] * 2


def test_a_mode_for_gpus_is_replaced_on_a_cpu(objective, caplog):
    caplog.set_level(logging.INFO, "llamahome")
    assert compile_layers(objective.causal, "reduce-overhead", tokens=0, trial=lambda tokens: None) == "default"
    assert "reduce-overhead is for GPUs" in caplog.text
