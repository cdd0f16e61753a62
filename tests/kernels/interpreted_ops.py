"""The Triton kernels of norm, rope, gated unit, loss and small LoRA layers against float64.

fp32 within 1e-6, bf16 within 1.5 times the error that torch makes in bf16; outputs start as NaN, so that what a kernel
leaves unwritten shows.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from llamahome.kernels import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    lora_triton,
    loss_triton,
    norm_triton,
)
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

DTYPES = [torch.float32, torch.bfloat16]


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def _check(ours, plain, exact, dtype):
    """Each result of a kernel against float64, beside the plain composition's in the same dtype."""
    for position, (value, other, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert not value.isnan().any(), position
        allowed = 1e-6 if dtype == torch.float32 else max(1.5 * _error(other, truth), 2**-12)
        assert _error(value, truth) <= allowed, (position, _error(value, truth), allowed)


def _with_gradients(function, inputs, seed=100):
    """Outputs and the gradients of all inputs for fixed random gradients of the outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [_random(*y.shape, seed=seed + i, dtype=torch.bfloat16).to(y.dtype) for i, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def _compare(kernel, reference, inputs, dtype):
    low = [x.to(dtype) for x in inputs]
    exact = _with_gradients(reference, [x.double() for x in low])
    _check(_with_gradients(kernel, low), _with_gradients(reference, low), exact, dtype)


def _strided(x, gap=3):
    """The same numbers with a gap after every row."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + gap), float("nan"))
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


# Norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "size"), [(1, 40), (7, 64), (65, 96), (33, 576), (3, 2048), (2, 4096), (300, 16)])
def test_rms_norm(rows, size, offset, dtype):
    inputs = [_random(rows, size), _random(size, seed=1)]
    _compare(
        lambda x, w: rms_norm(x, w, 1e-5, offset), lambda x, w: rms_norm_reference(x, w, 1e-5, offset), inputs, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "size"), [(1, 40), (7, 100), (33, 576), (2, 4096)])
def test_add_rms_norm(rows, size, offset, dtype):
    inputs = [_random(rows, size), _random(rows, size, seed=1), _random(size, seed=2)]
    _compare(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5, offset),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-5, offset),
        inputs, dtype,
    )  # fmt: skip


def test_rms_norm_sums_the_weights_gradient_over_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(norm_triton, "_PARTIALS", 3)
    inputs = [_random(29, 1024), _random(1024, seed=1)]
    _compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), inputs, torch.float32)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_of_heads_and_of_strided_rows(offset):
    x, w, dy = _random(5, 3, 40).float(), _random(40, seed=1).float(), _random(5, 3, 40, seed=2).float()
    y, rstd, _ = rms_norm_forward(x, w, 1e-5, offset)
    dx, dw = rms_norm_backward(dy, x, w, rstd, offset, need_weight=True)
    wide = [_strided(t) for t in (x, dy)]
    assert torch.equal(rms_norm_forward(wide[0], w, 1e-5, offset)[0], y)
    assert torch.equal(rms_norm_apply(wide[0], w, rstd, offset), y)
    again = rms_norm_backward(wide[1], wide[0], w, rstd, offset, need_weight=True)
    assert torch.equal(again[0], dx)
    assert torch.equal(again[1], dw)
    across = rms_norm_forward(x.transpose(0, 1), w, 1e-5, offset)[0]
    assert torch.equal(across, y.transpose(0, 1))


def test_a_norm_in_two_dtypes_is_what_the_plain_one_is():
    x, w = _random(5, 40).bfloat16(), _random(40, seed=1).float()
    for offset in (0.0, 1.0):
        assert rms_norm(x, w, 1e-5, offset).dtype == rms_norm_reference(x, w, 1e-5, offset).dtype
    residual = _random(5, 40, seed=2).float()
    y, summed = add_rms_norm(x, residual, w, 1e-5)
    plain_y, plain_summed = add_rms_norm_reference(x, residual, w, 1e-5)
    assert summed.dtype == torch.float32
    torch.testing.assert_close((y, summed), (plain_y, plain_summed), rtol=1e-6, atol=1e-6)


# Rope


def _angles(tokens, width, dtype):
    half = _random(tokens, width // 2, seed=9) * 3
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
    inputs = [_random(tokens, heads, size), _random(tokens, groups, size, seed=1)]
    _compare(
        lambda q, k: rotate(q, k, cos, sin),
        lambda q, k: rotate_reference(q, k, cos.to(q.dtype), sin.to(q.dtype)),
        inputs, dtype,
    )  # fmt: skip


def test_rope_turns_views_and_back():
    cos, sin = _angles(6, 64, torch.float32)
    whole = _random(6, 3 * 4 * 64).float()
    for x in whole.view(6, 12, 64).split(4, 1):
        y = rope_apply(x, cos, sin)
        assert torch.equal(y, rope_apply(x.contiguous(), cos, sin))
        torch.testing.assert_close(rope_apply(y, cos, sin, inverse=True), x, rtol=1e-5, atol=1e-5)


# Gated unit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "size"), [(1, 40), (7, 1000), (3, 1025), (2, 3072)])
def test_gated(rows, size, activation, dtype):
    e, g, dh = (_random(rows, size, seed=i).to(dtype) * 2 for i in range(3))
    results = [[gated_forward(e, g, activation), *gated_backward(dh, e, g, activation)]]
    for kind in (dtype, torch.float64):
        a, b = e.to(kind).requires_grad_(), g.to(kind).requires_grad_()
        h = gated_reference(a, b, activation)
        results.append([h, h, *torch.autograd.grad(h, (a, b), dh.to(kind))])
    _check(*results, dtype)


def _lora(rows, size, rank, dtype):
    shapes = [(rows, rank), (size, rank), (rows, rank), (size, rank)]
    return GatedLora(*(_random(*shape, seed=10 + i).to(dtype) for i, shape in enumerate(shapes)), 0.25, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "size", "rank"), [(1, 40, 4), (65, 100, 8), (7, 130, 16), (33, 64, 64), (70, 65, 5)])
def test_gated_with_an_absorbed_update(rows, size, rank, activation, dtype):
    e, g, dh = (_random(rows, size, seed=i).to(dtype) for i in range(3))
    lora = _lora(rows, size, rank, dtype)
    results = [[gated_forward(e, g, activation, lora), *gated_backward(dh, e, g, activation, lora)]]
    for kind in (dtype, torch.float64):
        xa_gate, b_gate, xa_up, b_up = (x.to(kind) for x in lora[:4])
        a = torch.addmm(e.to(kind), xa_gate, b_gate.T, alpha=lora[4]).requires_grad_()
        b = torch.addmm(g.to(kind), xa_up, b_up.T, alpha=lora[5]).requires_grad_()
        h = gated_reference(a, b, activation)
        results.append([h, h, *torch.autograd.grad(h, (a, b), dh.to(kind))])
    _check(*results, dtype)


def test_the_gated_unit_takes_halves_of_one_product_and_leaves_them_alone():
    both, dh = _random(5, 80).float(), _random(5, 40, seed=1).float()
    e, g = both.chunk(2, -1)
    kept = both.clone()
    lora = _lora(5, 40, 8, torch.float32)
    wide = lora._replace(xa_gate=_strided(lora.xa_gate), xa_up=_strided(lora.xa_up))
    for update, other in ((None, None), (lora, wide)):
        plain = gated_backward(dh, e.contiguous(), g.contiguous(), "silu", update)
        for ours, theirs in zip(gated_backward(dh, e, g, "silu", other), plain, strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(both, kept)


# Loss


OPTIONS = [
    {},
    {"logit_scale": 0.25},
    {"softcap": 3.0},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 5.0, "logit_scale": 2.0, "label_smoothing": 0.2, "z_loss": 0.02},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 53), (7, 1024), (9, 9000)])
def test_cross_entropy(rows, vocabulary, options, dtype):
    size = 24
    hidden, weight, bias = _random(rows, size), _random(vocabulary, size, seed=1) / 4, _random(vocabulary, seed=2)
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    labels[1::3] = -100
    results = []
    for function, kind in (
        (linear_cross_entropy, dtype), (linear_cross_entropy_reference, dtype),
        (linear_cross_entropy_reference, torch.float64),
    ):  # fmt: skip
        inputs = [x.to(dtype).to(kind).requires_grad_() for x in (hidden, weight, bias)]
        loss = function(*inputs[:2], labels, bias=inputs[2], reduction="sum", **options)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    _check(*results, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_over_a_large_vocabulary(dtype):
    z = (_random(3, 128259) * 3).to(dtype)
    labels = torch.tensor([0, 128258, 70000])
    exact = z.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), exact)
    losses = loss_triton.cross_entropy(z, labels, 1.0, 0.0, 0.0, 0.0, -100, True)
    assert _error(losses, loss) < 1e-6
    assert _error(z, grad) < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("gap", [20.0, 50.0, 80.0])
def test_a_label_that_is_all_but_certain_keeps_its_loss_and_gradient(gap):
    z = torch.tensor([[0.0, gap, 0.0]])
    loss = loss_triton.cross_entropy(z, torch.tensor([1]), 1.0, 0.0, 0.0, 0.0, -100, True)
    others = torch.exp(torch.tensor(-gap, dtype=torch.float64))
    torch.testing.assert_close(loss[0].double(), 2 * others, rtol=1e-5, atol=0)
    torch.testing.assert_close(z[0].double(), torch.stack([others, -2 * others, others]), rtol=1e-5, atol=0)


def test_a_hopeless_label_and_a_row_without_one():
    z = torch.tensor([[100.0, 0.0, -100.0], [5.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    kept = z.clone()
    loss = loss_triton.cross_entropy(z, torch.tensor([2, -100, 3]), 1.0, 0.0, 0.0, 0.0, -100, False)
    assert loss[:2].tolist() == [200.0, 0.0]
    assert loss[2].isnan()  # 3 is no column
    assert torch.equal(z, kept)
    loss_triton.cross_entropy(z, torch.tensor([2, -100, 3]), 1.0, 0.0, 0.0, 0.0, -100, True)
    torch.testing.assert_close(z[:2], torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]), rtol=1e-6, atol=1e-37)


def test_the_loss_alone_costs_no_gradient():
    hidden, weight = _random(6, 8).float().requires_grad_(), _random(50, 8, seed=1).float()
    labels = torch.arange(6)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, labels).detach())


# LoRA on few rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "rank"), [(1, 40, 24, 4), (7, 128, 33, 8), (65, 200, 64, 16), (130, 64, 40, 64)]
)
def test_a_lora_linear_layer_on_few_rows(rows, depth, columns, rank, biased, dtype):
    x, weight = _random(rows, depth).to(dtype), (_random(columns, depth, seed=1) / depth**0.5).to(dtype)
    a, b = (_random(rank, depth, seed=2) / depth**0.5).to(dtype), _random(columns, rank, seed=3).to(dtype)
    bias = _random(columns, seed=4).to(dtype) if biased else None
    results = [lora_triton.lora_linear(x, weight, bias, a, b, 0.5)]
    for kind in (dtype, torch.float64):
        base = torch.nn.functional.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
        xa = x.to(kind) @ a.to(kind).T
        results.append([base + xa @ b.to(kind).T * 0.5, xa])
    _check(*results, dtype)


def test_a_lora_linear_layer_takes_views():
    x, weight, a, b = (_random(*shape).float() for shape in ((5, 40), (24, 40), (8, 40), (24, 8)))
    plain = lora_triton.lora_linear(x, weight, None, a, b, 0.5)
    for ours, theirs in zip(
        lora_triton.lora_linear(_strided(x), weight.T.contiguous().T, None, _strided(a), b.T.contiguous().T, 0.5),
        plain, strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, theirs)


def test_which_inputs_are_few_rows():
    assert lora_triton.fits(torch.zeros(256, 8))
    assert not lora_triton.fits(torch.zeros(257, 8))
    assert not lora_triton.fits(torch.zeros(0, 8))
    assert not lora_triton.fits(torch.zeros(4, 8, dtype=torch.float64))


# Properties


def test_two_runs_give_the_same_bits():
    x, w, dy = _random(33, 100).bfloat16(), _random(100, seed=1).bfloat16(), _random(33, 100, seed=2).bfloat16()
    lora = _lora(33, 100, 8, torch.bfloat16)

    def run():
        _, rstd, _ = rms_norm_forward(x, w, 1e-5)
        z = x.clone()
        losses = loss_triton.cross_entropy(z, torch.arange(33), 1.0, 0.0, 0.1, 0.01, -100, True)
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
    x, w = _random(5, 40).float().requires_grad_(), _random(40, seed=1).float().requires_grad_()
    shared = _random(5, 40, seed=2).float()
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
    x, residual, weight = _random(5, 16).float(), _random(5, 16, seed=1).float(), _random(16, seed=2).float()
    head, labels = _random(30, 16, seed=3).float(), torch.tensor([1, -100, 29, 4, 0])
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
    inputs = [_random(rows, size), _random(rows, size, seed=1), _random(size, seed=2)]
    _compare(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-6, offset),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-6, offset),
        inputs, dtype,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [4, 8, 16, 64, 128])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 4096, 64), (129, 576, 200), (256, 1000, 96)])
def test_lora_linear_layers_at_more_shapes(rows, depth, columns, rank, dtype):
    test_a_lora_linear_layer_on_few_rows(rows, depth, columns, rank, False, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_cross_entropy_over_llama_3s_vocabulary(options, dtype):
    test_cross_entropy(6, 128256, options, dtype)
