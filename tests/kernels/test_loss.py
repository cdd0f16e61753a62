"""The chunked loss equals its plain definition, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from llamahome.kernels.loss import chunk_rows_for
from torch.nn import functional as F

from llamahome.kernels import linear_cross_entropy, linear_cross_entropy_reference, token_statistics


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
