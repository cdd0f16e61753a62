"""The chunked loss equals its plain definition, in value and in every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from llamahome.kernels import linear_cross_entropy, linear_cross_entropy_reference, token_statistics
from llamahome.kernels import loss as loss_module
from llamahome.kernels.loss import chunk_rows_for


def _inputs(rows=37, size=12, vocabulary=53, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, bias, labels


@pytest.mark.parametrize("chunk_rows", [1, 8, 37, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logit_scale": 0.25},
        {"softcap": 3.0},
        {"label_smoothing": 0.1},
        {"softcap": 2.0, "logit_scale": 3.0, "label_smoothing": 0.2},
    ],
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_value_and_gradients_equal_the_definition(chunk_rows, options, reduction):
    hidden, weight, bias, labels = _inputs()
    labels[::5] = -100
    results = []
    for function, extra in ((linear_cross_entropy, {"chunk_rows": chunk_rows}), (linear_cross_entropy_reference, {})):
        loss = function(hidden, weight, labels, bias=bias, reduction=reduction, **options, **extra)
        results.append((loss, *torch.autograd.grad(loss * 1.7, (hidden, weight, bias))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "exactness"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_weights_gradient_is_summed_in_blocks_over_all_chunks(dtype, exactness):
    hidden, weight, bias, labels = _inputs(rows=70, size=2048, vocabulary=700, dtype=dtype)
    assert weight.numel() * weight.element_size() > 2 * loss_module._SUM_BYTES
    grads = []
    for function, extra in ((linear_cross_entropy, {"chunk_rows": 32}), (linear_cross_entropy_reference, {})):
        loss = function(hidden / 2048**0.5, weight, labels, bias=bias, **extra)
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads, rtol=exactness, atol=exactness)


def test_no_row_gives_a_weight_no_gradient():
    hidden, weight, _, labels = _inputs()
    linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), reduction="sum").backward()
    assert weight.grad.count_nonzero() == 0


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, labels = _inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_a_frozen_weight_gets_no_gradient_and_costs_none():
    hidden, weight, _, labels = _inputs()
    loss = linear_cross_entropy(hidden, weight.detach(), labels)
    assert [
        x for x in loss.grad_fn.next_functions[0][0].saved_tensors if x is not None and x.shape == weight.shape
    ] == []
    loss.backward()
    assert weight.grad is None
    assert hidden.grad.abs().max() > 0


def test_autocast_computes_in_bf16_and_sums_in_fp32():
    hidden, weight, _, labels = _inputs(rows=300, dtype=torch.float32)
    exact = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        low = linear_cross_entropy(hidden, weight, labels)
    assert low.dtype == torch.float32
    assert low != exact
    torch.testing.assert_close(low, exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [5, 33, 100])  # counts that are no powers of two
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"softcap": 5.0, "logit_scale": 2.0, "label_smoothing": 0.2, "z_loss": 0.02}]
)
def test_bf16_stays_as_near_to_float64_as_plain_pytorch(options, reduction, rows):
    """The mean's division must not round the gradient a second time: it made 1.9 times the error."""
    *inputs, labels = _inputs(rows=rows, size=24, vocabulary=200)
    labels[1::3] = -100
    results = []
    for function, dtype in (
        (linear_cross_entropy, torch.bfloat16), (linear_cross_entropy_reference, torch.bfloat16),
        (linear_cross_entropy_reference, torch.float64),
    ):  # fmt: skip
        low = [x.detach().bfloat16().to(dtype).requires_grad_() for x in inputs]
        loss = function(*low[:2], labels, bias=low[2], reduction=reduction, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, low)))
    for ours, plain, exact in zip(*results, strict=True):
        allowed = max(1.5 * (plain.double() - exact).norm(), 2**-14 * exact.norm())
        assert (ours.double() - exact).norm() <= allowed


def test_the_mean_in_fp16_loses_no_small_gradient():
    """It is applied to the rounded gradient as a power of two: p / count in fp16 would be zero."""
    hidden, weight = torch.ones(1, 1, dtype=torch.float16), torch.zeros(3000, 1, dtype=torch.float16)
    hidden, weight = hidden.repeat(1000, 1).requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.zeros(1000, dtype=torch.int64)) * 65536
    (grad,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(grad[1:].float(), torch.full((2999, 1), 65536 / 3000), rtol=1e-3, atol=0)


def test_statistics_are_the_loss_and_the_hits():
    hidden, weight, bias, labels = _inputs()
    logits = hidden @ weight.T + bias
    labels[:10] = logits[:10].argmax(-1)
    loss, correct = token_statistics(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="sum"))
    assert correct == (logits.argmax(-1) == labels).sum()


def test_no_row_at_all_gives_zero():
    hidden, weight, _, labels = _inputs(rows=4)
    assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), reduction="sum") == 0


def test_an_unknown_reduction_is_refused():
    hidden, weight, _, labels = _inputs(rows=4)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(hidden, weight, labels, reduction="none")


@pytest.mark.parametrize("vocabulary", [100, 49152, 128256, 262144])
def test_chunks_keep_their_logits_small(vocabulary):
    rows = chunk_rows_for(vocabulary)
    assert 128 <= rows <= 4096
    assert rows == 128 or rows * vocabulary * 4 <= 64 << 20


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_z_loss_adds_the_squared_normaliser(reduction):
    hidden, weight, bias, labels = _inputs()
    labels[::4] = -100
    options = {"bias": bias, "reduction": reduction, "softcap": 4.0, "label_smoothing": 0.1}
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        loss = function(hidden, weight, labels, z_loss=0.03, **options)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    kept = labels != -100
    logits = 4.0 * torch.tanh((hidden @ weight.T + bias)[kept] / 4.0)
    squares = logits.logsumexp(-1).square()
    added = results[0][0] - linear_cross_entropy(hidden, weight, labels, **options)
    torch.testing.assert_close(added, 0.03 * (squares.sum() if reduction == "sum" else squares.mean()))


@pytest.mark.parametrize("gap", [20.0, 50.0, 80.0])
def test_a_label_that_is_all_but_certain_keeps_its_loss_and_gradient(gap):
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[gap], [0.0], [0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    loss.backward()
    torch.testing.assert_close(loss.double(), torch.tensor(2 * math.exp(-gap)).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        hidden.grad.double(), torch.tensor([[-2 * gap * math.exp(-gap)]]).double(), rtol=1e-5, atol=0
    )


def test_a_vocabulary_of_one_costs_nothing():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(1, 4), torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_a_label_outside_the_vocabulary_is_refused():
    hidden, weight, _, labels = _inputs(rows=4)
    labels[2] = weight.shape[0]
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("ignored", [False, True])
def test_compiled_is_one_graph_and_equal_to_eager(ignored):
    hidden, weight, bias, labels = _inputs()
    if ignored:
        labels[::3] = -100

    def function(hidden, weight, bias):
        return linear_cross_entropy(hidden * 2, weight, labels, bias=bias, label_smoothing=0.1)

    results = []
    for form in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        loss = form(hidden, weight, bias)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused():
    hidden, weight, _, labels = _inputs(rows=4)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
