"""The norm rounds as transformers' modules do, its gradients are the mathematics, and a compiler sees through it."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llamahome.kernels.norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_apply,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
)

OFFSETS = [0.0, 1.0]


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("module", "offset"), [(LlamaRMSNorm, 0.0), (Gemma2RMSNorm, 1.0)])
def test_outputs_have_the_bits_of_transformers(module, offset, dtype):
    layer = module(40, eps=1e-5).to(dtype)
    layer.weight.data = _random(40, dtype=dtype)
    x, residual = _random(2, 7, 40, seed=1, dtype=dtype), _random(2, 7, 40, seed=2, dtype=dtype)
    expected = layer(x)
    assert torch.equal(rms_norm(x, layer.weight, 1e-5, offset), expected)
    assert torch.equal(rms_norm_reference(x, layer.weight, 1e-5, offset), expected)
    y, summed = add_rms_norm(x, residual, layer.weight, 1e-5, offset)
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, layer(x + residual))


@pytest.mark.parametrize("offset", OFFSETS)
def test_gradients_are_the_mathematics(offset):
    x, residual, weight = (_random(*shape).requires_grad_() for shape in ((3, 2, 8), (3, 2, 8), (8,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, offset), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-5, offset), (x, residual, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", OFFSETS)
def test_gradients_round_less_than_the_plain_compositions(offset, dtype):
    inputs = [_random(33, 64), _random(33, 64, seed=1), _random(64, seed=2)]
    dy = _random(33, 64, seed=3)
    results = []
    for function, kind in (
        (add_rms_norm, dtype),
        (add_rms_norm_reference, dtype),
        (add_rms_norm_reference, torch.float64),
    ):
        parts = [x.to(dtype).to(kind).requires_grad_() for x in inputs]
        y, summed = function(*parts, 1e-5, offset)
        grads = torch.autograd.grad((y, summed), parts, [dy.to(dtype).to(kind)] * 2)
        results.append([g.double() for g in grads])
    for ours, plain, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 1.01 * (plain - exact).norm() + 1e-7 * exact.norm()


def test_a_frozen_weight_costs_no_gradient():
    x, weight = _random(3, 8).requires_grad_(), _random(8)
    y, rstd, _ = rms_norm_forward(x.detach(), weight, 1e-5)
    assert rms_norm_backward(y, x.detach(), weight, rstd)[1] is None
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad.abs().max() > 0
    assert weight.grad is None


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_output_is_made_again_from_what_is_saved(offset):
    x, weight = _random(5, 16, dtype=torch.bfloat16), _random(16, seed=1, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rms_norm(x.requires_grad_(), weight, 1e-5, offset)
    assert sorted(t.numel() for t in saved) == [5, 16, 80]
    rstd = next(t for t in saved if t.numel() == 5)
    assert rstd.dtype == torch.float32
    assert torch.equal(rms_norm_apply(x.detach(), weight, rstd, offset), y)


def test_a_second_derivative_is_refused():
    x, weight = _random(3, 8).requires_grad_(), _random(8)
    (grad,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_compiled_is_one_graph_and_equal_to_eager():
    x, residual, weight = (_random(*shape).requires_grad_() for shape in ((3, 8), (3, 8), (8,)))

    def function(x, residual, weight):
        y, summed = add_rms_norm(x * 2, residual, weight, 1e-5, 1.0)
        return rms_norm(y + summed, weight, 1e-5)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for form in (function, compiled):
        y = form(x, residual, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, residual, weight))))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-12, atol=1e-12)
