"""The Triton kernels of norm, rope and the gated unit against float64.

fp32 within 1e-6, bf16 within 1.5 times the error that torch makes in bf16; outputs start as NaN, so that what a kernel
leaves unwritten shows.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from against_float64 import DTYPES, check, compare, random, strided
from torch._dynamo.backends.debugging import aot_eager

from llamahome.kernels import (
    linear_cross_entropy,
    lora_triton,
    loss_triton,
    norm_triton,
)
from llamahome.kernels.low_rank import LowRank, add_low_rank
from llamahome.kernels.mlp import GatedLora, gated, gated_backward, gated_forward, gated_reference
from llamahome.kernels.norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_apply,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
)
from llamahome.kernels.rope import rope_apply, rotate, rotate_reference

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")

# Norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "size"), [(1, 40), (7, 64), (65, 96), (33, 576), (3, 2048), (2, 4096), (300, 16)])
def test_rms_norm(rows, size, offset, dtype):
    inputs = [random(rows, size), random(size, seed=1)]
    compare(
        lambda x, w: rms_norm(x, w, 1e-5, offset), lambda x, w: rms_norm_reference(x, w, 1e-5, offset), inputs, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "size"), [(1, 40), (7, 100), (33, 576), (2, 4096)])
def test_add_rms_norm(rows, size, offset, dtype):
    inputs = [random(rows, size), random(rows, size, seed=1), random(size, seed=2)]
    compare(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5, offset),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-5, offset),
        inputs, dtype,
    )  # fmt: skip


def test_rms_norm_sums_the_weights_gradient_over_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(norm_triton, "_PARTIALS", 3)
    inputs = [random(29, 1024), random(1024, seed=1)]
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), inputs, torch.float32)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_of_heads_and_of_strided_rows(offset):
    x, w, dy = random(5, 3, 40).float(), random(40, seed=1).float(), random(5, 3, 40, seed=2).float()
    y, rstd, _ = rms_norm_forward(x, w, 1e-5, offset)
    dx, dw = rms_norm_backward(dy, x, w, rstd, offset, need_weight=True)
    wide = [strided(t) for t in (x, dy)]
    assert torch.equal(rms_norm_forward(wide[0], w, 1e-5, offset)[0], y)
    assert torch.equal(rms_norm_apply(wide[0], w, rstd, offset), y)
    again = rms_norm_backward(wide[1], wide[0], w, rstd, offset, need_weight=True)
    assert torch.equal(again[0], dx)
    assert torch.equal(again[1], dw)
    across = rms_norm_forward(x.transpose(0, 1), w, 1e-5, offset)[0]
    assert torch.equal(across, y.transpose(0, 1))


def test_a_norm_in_two_dtypes_is_what_the_plain_one_is():
    x, w = random(5, 40).bfloat16(), random(40, seed=1).float()
    for offset in (0.0, 1.0):
        assert rms_norm(x, w, 1e-5, offset).dtype == rms_norm_reference(x, w, 1e-5, offset).dtype
    residual = random(5, 40, seed=2).float()
    y, summed = add_rms_norm(x, residual, w, 1e-5)
    plain_y, plain_summed = add_rms_norm_reference(x, residual, w, 1e-5)
    assert summed.dtype == torch.float32
    torch.testing.assert_close((y, summed), (plain_y, plain_summed), rtol=1e-6, atol=1e-6)


# Rope


def _angles(tokens, width, dtype):
    half = random(tokens, width // 2, seed=9) * 3
    return torch.cat((half, half), -1).cos().to(dtype), torch.cat((half, half), -1).sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "size", "turned"),
    [
        (1, 1, 1, 40, 40),
        (7, 8, 2, 64, 64),
        (5, 9, 3, 64, 64),
        (3, 4, 4, 96, 48),
        (2, 40, 8, 128, 128),
        (3, 2, 1, 80, 32),
    ],
)
def test_rope(tokens, heads, groups, size, turned, dtype):
    cos, sin = _angles(tokens, turned, dtype)
    inputs = [random(tokens, heads, size), random(tokens, groups, size, seed=1)]
    compare(
        lambda q, k: rotate(q, k, cos, sin),
        lambda q, k: rotate_reference(q, k, cos.to(q.dtype), sin.to(q.dtype)),
        inputs, dtype,
    )  # fmt: skip


def test_rope_turns_views_and_back():
    cos, sin = _angles(6, 64, torch.float32)
    whole = random(6, 3 * 4 * 64).float()
    for x in whole.view(6, 12, 64).split(4, 1):
        y = rope_apply(x, cos, sin)
        assert torch.equal(y, rope_apply(x.contiguous(), cos, sin))
        torch.testing.assert_close(rope_apply(y, cos, sin, inverse=True), x, rtol=1e-5, atol=1e-5)


# Absorbed rank-r parts of the projections before norm and rope


def _update(rows, size, rank, dtype):
    return LowRank(random(rows, rank, seed=20).to(dtype), random(size, rank, seed=21).to(dtype), 0.5)


def _wide(update, kind):
    return LowRank(update.xa.to(kind), update.b.to(kind), update.scaling)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "size", "rank"), [(1, 40, 4), (17, 100, 8), (33, 576, 16), (5, 300, 64), (3, 64, 5)])
def test_add_rms_norm_with_an_absorbed_update(rows, size, rank, offset, dtype):
    x, residual, weight = (random(*shape, seed=i).to(dtype) for i, shape in enumerate([(rows, size)] * 2 + [(size,)]))
    update = _update(rows, size, rank, dtype)
    y, rstd, summed = rms_norm_forward(x, weight, 1e-5, offset, residual, update)
    assert torch.equal(rms_norm_apply(summed, weight, rstd, offset), y)
    results = [(y, summed)]
    for kind in (dtype, torch.float64):
        whole = add_low_rank(x.to(kind), _wide(update, kind))
        results.append(add_rms_norm_reference(whole, residual.to(kind), weight.to(kind), 1e-5, offset))
    assert summed.dtype == dtype
    check(*results, dtype)


def test_an_absorbed_update_takes_a_residual_of_another_dtype_and_strided_rows():
    x, residual, weight = random(5, 40).bfloat16(), random(5, 40, seed=1).float(), random(40, seed=2).bfloat16()
    update = _update(5, 40, 8, torch.bfloat16)
    y, rstd, summed = rms_norm_forward(x, weight, 1e-5, 0.0, residual, update)
    assert summed.dtype == torch.float32
    again = rms_norm_forward(
        strided(x), weight, 1e-5, 0.0, strided(residual), update._replace(xa=strided(update.xa), b=strided(update.b))
    )
    assert all(map(torch.equal, again, (y, rstd, summed)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "size", "turned", "rank"),
    [(1, 1, 40, 40, 4), (70, 3, 64, 64, 8), (5, 8, 128, 128, 16), (3, 2, 80, 80, 64), (7, 2, 96, 48, 8)],
)
def test_rope_with_an_absorbed_update(tokens, heads, size, turned, rank, inverse, dtype):
    cos, sin = _angles(tokens, turned, dtype)
    x, update = random(tokens, heads, size).to(dtype), _update(tokens, heads * size, rank, dtype)
    results = [[rope_apply(x, cos, sin, inverse, update)]]
    for kind in (dtype, torch.float64):
        whole = add_low_rank(x.to(kind).flatten(1), _wide(update, kind)).view(x.shape)
        turn = -sin if inverse else sin
        results.append([rotate_reference(whole, whole, cos.to(kind), turn.to(kind))[0]])
    check(*results, dtype)


# Gated unit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "size"), [(1, 40), (7, 1000), (3, 1025), (2, 3072)])
def test_gated(rows, size, activation, dtype):
    e, g, dh = (random(rows, size, seed=i).to(dtype) * 2 for i in range(3))
    results = [[gated_forward(e, g, activation), *gated_backward(dh, e, g, activation)]]
    for kind in (dtype, torch.float64):
        a, b = e.to(kind).requires_grad_(), g.to(kind).requires_grad_()
        h = gated_reference(a, b, activation)
        results.append([h, h, *torch.autograd.grad(h, (a, b), dh.to(kind))])
    check(*results, dtype)


def _lora(rows, size, rank, dtype):
    shapes = [(rows, rank), (size, rank), (rows, rank), (size, rank)]
    return GatedLora(*(random(*shape, seed=10 + i).to(dtype) for i, shape in enumerate(shapes)), 0.25, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "size", "rank"), [(1, 40, 4), (65, 100, 8), (7, 130, 16), (33, 64, 64), (70, 65, 5)])
def test_gated_with_an_absorbed_update(rows, size, rank, activation, dtype):
    e, g, dh = (random(rows, size, seed=i).to(dtype) for i in range(3))
    lora = _lora(rows, size, rank, dtype)
    results = [[gated_forward(e, g, activation, lora), *gated_backward(dh, e, g, activation, lora)]]
    for kind in (dtype, torch.float64):
        xa_gate, b_gate, xa_up, b_up = (x.to(kind) for x in lora[:4])
        a = torch.addmm(e.to(kind), xa_gate, b_gate.T, alpha=lora[4]).requires_grad_()
        b = torch.addmm(g.to(kind), xa_up, b_up.T, alpha=lora[5]).requires_grad_()
        h = gated_reference(a, b, activation)
        results.append([h, h, *torch.autograd.grad(h, (a, b), dh.to(kind))])
    check(*results, dtype)


def test_the_gated_unit_takes_halves_of_one_product_and_leaves_them_alone():
    both, dh = random(5, 80).float(), random(5, 40, seed=1).float()
    e, g = both.chunk(2, -1)
    kept = both.clone()
    lora = _lora(5, 40, 8, torch.float32)
    wide = lora._replace(xa_gate=strided(lora.xa_gate), xa_up=strided(lora.xa_up))
    for update, other in ((None, None), (lora, wide)):
        plain = gated_backward(dh, e.contiguous(), g.contiguous(), "silu", update)
        for ours, theirs in zip(gated_backward(dh, e, g, "silu", other), plain, strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(both, kept)


# Properties


def test_two_runs_give_the_same_bits():
    x, w, dy = random(33, 100).bfloat16(), random(100, seed=1).bfloat16(), random(33, 100, seed=2).bfloat16()
    lora = _lora(33, 100, 8, torch.bfloat16)

    def run():
        _, rstd, _ = rms_norm_forward(x, w, 1e-5)
        z = x.clone()
        losses = loss_triton.cross_entropy(z, torch.arange(33), None, 1.0, 0.0, 0.1, 0.01, -100, True)
        return [
            *rms_norm_backward(dy, x, w, rstd, need_weight=True),
            *gated_backward(dy, x, dy, "silu", lora),
            losses,
            z,
            *lora_triton.lora_linear(x, dy, None, x[:8], x[:, :8], 0.5),
        ]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_a_gradient_that_others_hold_is_not_written_to():
    x, w = random(5, 40).float().requires_grad_(), random(40, seed=1).float().requires_grad_()
    shared = random(5, 40, seed=2).float()
    kept = shared.clone()
    torch.autograd.backward([rms_norm(x, w, 1e-5), x * 1.0], [shared, shared])
    assert torch.equal(shared, kept)


def test_no_rows_are_no_launch():
    x, w = torch.zeros(0, 40), torch.ones(40)
    y, rstd, _ = rms_norm_forward(x, w, 1e-5)
    dx, dw = rms_norm_backward(x, x, w, rstd, need_weight=True)
    assert y.shape == dx.shape == (0, 40)
    assert not dw.any()
    assert gated_forward(x, x).shape == (0, 40)
    assert rope_apply(torch.zeros(0, 2, 8), torch.zeros(0, 8), torch.zeros(0, 8)).shape == (0, 2, 8)


def test_a_compiler_sees_one_graph_of_operators():
    x, residual, weight = random(5, 16).float(), random(5, 16, seed=1).float(), random(16, seed=2).float()
    head, labels = random(30, 16, seed=3).float(), torch.tensor([1, -100, 29, 4, 0])
    cos, sin = _angles(5, 8, torch.float32)
    nodes = []

    def function(x, residual, weight, head):
        y, summed = add_rms_norm(x, residual, weight, 1e-5)
        q, k = rotate(y.view(5, 2, 8), summed.view(5, 2, 8), cos, sin)
        h = gated(q.flatten(1), k.flatten(1))
        return linear_cross_entropy(rms_norm(h, weight, 1e-5, 1.0), head, labels)

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    results = []
    for form in (function, torch.compile(function, backend=backend, fullgraph=True)):
        inputs = [t.clone().requires_grad_() for t in (x, residual, weight, head)]
        loss = form(*inputs)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    for name in ("add_rms_norm", "rope", "gated", "rms_norm", "linear_cross_entropy"):
        assert any(target.startswith(f"llamahome.{name}") for target in nodes), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "size", "offset"), list(itertools.product([1, 17, 129], [40, 128, 1000, 8192], [0.0, 1.0]))
)
def test_norms_at_more_shapes(rows, size, offset, dtype):
    inputs = [random(rows, size), random(rows, size, seed=1), random(size, seed=2)]
    compare(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-6, offset),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-6, offset),
        inputs, dtype,
    )  # fmt: skip
