"""The gated unit equals transformers' MLP in every bit, forward and backward, and absorbs a LoRA update."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from llamahome.kernels.mlp import GatedLora, gated, gated_backward, gated_forward

ACTIVATIONS = [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")]


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "theirs"), ACTIVATIONS)
def test_values_and_gradients_have_the_bits_of_transformers(name, theirs, dtype):
    e, g, dh = (_random(2, 7, 24, seed=i, dtype=dtype).requires_grad_() for i in range(3))
    h = ACT2FN[theirs](e) * g
    expected = (h, *torch.autograd.grad(h, (e, g), dh))
    ours = gated(e, g, name)
    for value, other in zip((ours, *torch.autograd.grad(ours, (e, g), dh)), expected, strict=True):
        assert torch.equal(value, other)
    with torch.no_grad():
        for value, other in zip(gated_backward(dh, e, g, name), expected, strict=True):
            assert torch.equal(value, other)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_an_absorbed_update_is_the_same_as_one_added_before(name):
    e, g, dh = (_random(7, 24, seed=i) for i in range(3))
    shapes = ((7, 4), (24, 4), (7, 4), (24, 4))
    lora = GatedLora(*(_random(*shape, seed=5 + i) for i, shape in enumerate(shapes)), 0.5, 2.0)
    whole_e, whole_g = e + 0.5 * lora.xa_gate @ lora.b_gate.T, g + 2.0 * lora.xa_up @ lora.b_up.T
    torch.testing.assert_close(gated_forward(e, g, name, lora), gated_forward(whole_e, whole_g, name))
    for absorbed, plain in zip(
        gated_backward(dh, e, g, name, lora), gated_backward(dh, whole_e, whole_g, name), strict=True
    ):
        torch.testing.assert_close(absorbed, plain)


def test_nothing_that_was_given_is_written_to():
    tensors = [_random(5, 8, seed=i) for i in range(3)]
    kept = [x.clone() for x in tensors]
    results = gated_backward(*tensors)
    for x, before in zip(tensors, kept, strict=True):
        assert torch.equal(x, before)
    assert not {x.data_ptr() for x in tensors} & {y.data_ptr() for y in results}


def test_only_the_two_inputs_are_saved():
    e, g = _random(5, 8).requires_grad_(), _random(5, 8, seed=1).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated(e, g)
    assert [t.data_ptr() for t in saved] == [e.data_ptr(), g.data_ptr()]


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="activation must be"):
        gated(_random(2, 2), _random(2, 2), "relu")


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_compiled_is_one_graph_and_equal_to_eager(name):
    e, g = _random(5, 8).requires_grad_(), _random(5, 8, seed=1).requires_grad_()

    def function(e, g):
        return gated(e * 2, g, name)

    results = []
    for form in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        h = form(e, g)
        results.append((h, *torch.autograd.grad(h.square().sum(), (e, g))))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-12, atol=1e-12)
