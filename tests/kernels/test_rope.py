"""Rotation equals transformers' in every bit, keeps lengths, depends on distances only, and turns back."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partly

from llamahome.kernels.rope import rope_apply, rotate


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _angles(positions, width, dtype=torch.float64):
    frequencies = 100.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = positions[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "theirs"), [(16, apply_rotary_pos_emb), (8, apply_partly)])
def test_outputs_have_the_bits_of_transformers(width, theirs, dtype):
    q, k = _random(7, 4, 16, dtype=dtype), _random(7, 2, 16, seed=1, dtype=dtype)
    cos, sin = _angles(torch.arange(7), width, dtype)
    expected = theirs(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    for ours, other in zip(rotate(q, k, cos, sin), expected, strict=True):
        assert torch.equal(ours, other[0])


def test_scores_depend_on_distances_only_and_lengths_stay():
    x, y = _random(1, 1, 16), _random(1, 1, 16, seed=1)

    def turned(x, position):
        return rope_apply(x, *_angles(torch.tensor([position]), 16))

    scores = [(turned(x, p + 3) * turned(y, p)).sum() for p in (0, 5, 100)]
    torch.testing.assert_close(scores, [scores[0]] * 3)
    torch.testing.assert_close(turned(x, 9).norm(), x.norm())


@pytest.mark.parametrize("width", [16, 8])
def test_turning_back_is_the_inverse_and_the_gradient(width):
    cos, sin = _angles(torch.arange(5), width)
    q, k = _random(5, 2, 16).requires_grad_(), _random(5, 1, 16, seed=1).requires_grad_()
    torch.testing.assert_close(rope_apply(rope_apply(q, cos, sin), cos, sin, inverse=True), q)
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (q, k))


def test_wide_angles_keep_the_inputs_dtype():
    cos, sin = _angles(torch.arange(5), 16, torch.float32)
    x = _random(5, 2, 16, dtype=torch.bfloat16)
    y = rope_apply(x, cos, sin)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rope_apply(x.float(), cos, sin).bfloat16())


def test_only_the_angles_are_saved():
    cos, sin = _angles(torch.arange(5), 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotate(_random(5, 2, 16).requires_grad_(), _random(5, 1, 16), cos, sin)
    assert [t.shape for t in saved] == [cos.shape, sin.shape]


def test_compiled_is_one_graph_and_equal_to_eager():
    cos, sin = _angles(torch.arange(5), 16)
    q, k = _random(5, 2, 16).requires_grad_(), _random(5, 1, 16, seed=1).requires_grad_()
    results = []
    for form in (rotate, torch.compile(rotate, backend="aot_eager", fullgraph=True)):
        outputs = form(q, k, cos, sin)
        results.append((*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], (q, k))))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-12, atol=1e-12)
