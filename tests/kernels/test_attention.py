"""Packed attention equals its plain definition, and no sample sees another."""

from __future__ import annotations

import pytest
import torch

from llamahome.kernels import varlen_attention, varlen_attention_reference


def _inputs(lengths, heads=4, kv_heads=2, size=16, dtype=torch.float64, tail=0):
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    total = sum(lengths) + tail
    shapes = ((total, heads, size), (total, kv_heads, size), (total, kv_heads, size))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, edges


def _with_gradients(function, q, k, v, *rest):
    out = function(q, k, v, *rest)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), (q, k, v))


@pytest.mark.parametrize("lengths", [[7], [1], [1, 1, 1], [5, 1, 33, 2], [64, 65]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_output_and_gradients_equal_the_definition(lengths, heads, kv_heads, window):
    q, k, v, edges = _inputs(lengths, heads, kv_heads)
    ours = _with_gradients(varlen_attention, q, k, v, edges, 0.3, window)
    plain = _with_gradients(varlen_attention_reference, q, k, v, edges, 0.3, window)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_stays_near_float64(dtype, bound):
    q, k, v, edges = _inputs([40, 3, 90], dtype=dtype)
    exact = _with_gradients(
        varlen_attention_reference, *(x.detach().double().requires_grad_() for x in (q, k, v)), edges, 0.25
    )
    for a, b in zip(_with_gradients(varlen_attention, q, k, v, edges, 0.25), exact, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < bound


def test_softcap_bends_the_scores():
    q, k, v, edges = _inputs([9, 4])
    capped = varlen_attention(q, k, v, edges, 1.0, 0, 0.5)
    assert not torch.allclose(capped, varlen_attention(q, k, v, edges, 1.0))
    scores = 0.5 * torch.tanh((q[:9].transpose(0, 1) @ k[:9].repeat_interleave(2, 1).permute(1, 2, 0)) / 0.5)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:9].repeat_interleave(2, 1).transpose(0, 1)
    torch.testing.assert_close(capped[:9], expected.transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_tokens_past_the_last_boundary_give_zeros():
    q, k, v, edges = _inputs([5, 6], tail=4)
    out, *gradients = _with_gradients(varlen_attention, q, k, v, edges, 0.3)
    for tensor in (out, *gradients):
        assert tensor[11:].abs().max() == 0
        assert tensor[:11].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 4])
def test_a_changed_sample_leaves_every_bit_of_the_others(dtype, window):
    q, k, v, edges = _inputs([12, 20, 7], dtype=dtype)
    before = _with_gradients(varlen_attention, q, k, v, edges, 0.25, window)
    changed = [x.detach().clone() for x in (q, k, v)]
    for tensor in changed:
        tensor[12:32] += 1
    after = _with_gradients(varlen_attention, *(x.requires_grad_() for x in changed), edges, 0.25, window)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:12], b[:12])
        assert torch.equal(a[32:], b[32:])
        assert not torch.equal(a[12:32], b[12:32])


def test_inputs_need_not_be_contiguous():
    q, k, v, edges = _inputs([8, 5])
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    for a, b in zip(
        _with_gradients(varlen_attention, q, k, v, edges, 0.3),
        _with_gradients(varlen_attention, *strided, edges, 0.3),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_operator_is_well_formed():
    q, k, v, edges = _inputs([6, 3])
    torch.library.opcheck(torch.ops.llamahome.varlen_attention, (q, k, v, edges, 0.3, 0, 0.0))


def test_compile_sees_through_it():
    q, k, v, edges = _inputs([6, 3], dtype=torch.float32)
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(
        _with_gradients(compiled, q, k, v, edges, 0.3),
        _with_gradients(varlen_attention, q, k, v, edges, 0.3),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
