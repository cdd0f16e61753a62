"""Cross-entropy in C++: the definition's value and gradient, small losses, numbers that are none, wrong labels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llamahome import _C
from llamahome.kernels import linear_cross_entropy, loss
from llamahome.kernels.loss_native import native_cross_entropy

pytestmark = pytest.mark.skipif(not _C.has_avx512_bf16(), reason="needs a processor with AVX512-BF16")


def _logits(rows, size, spread=4.0):
    generator = torch.Generator().manual_seed(rows * size)
    z = (torch.randn(rows, size, generator=generator) * spread).bfloat16()
    return z, torch.randint(0, size, (rows,), generator=generator)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 2), (5, 15), (8, 16), (9, 33), (40, 1000), (7, 49152)])
@pytest.mark.parametrize("gradient", [False, True])
def test_value_and_gradient_are_those_of_float64(rows, size, gradient):
    z, labels = _logits(rows, size)
    exact = z.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (0.7 * expected.sum()).backward()
    before = z.clone()
    losses = native_cross_entropy(z, labels, 0.7, gradient=gradient)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=2e-6)
    if gradient:
        torch.testing.assert_close(z.double(), exact.grad, rtol=2**-8, atol=1e-30)
    else:
        assert torch.equal(z, before)


def test_a_small_loss_keeps_its_digits():
    z, labels = _logits(4, 300)
    z.scatter_(1, labels[:, None], 40.0)
    others = (z.double() - 40).scatter(1, labels[:, None], float("-inf"))
    expected = others.exp().sum(1).log1p()
    assert (expected < 1e-9).all()
    losses = native_cross_entropy(z, labels, 1.0, gradient=True)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    own = z.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(own.double(), -expected, rtol=2**-8, atol=0)


def test_what_is_no_number_stays_none_and_minus_infinity_has_no_share():
    z, labels = _logits(3, 40)
    labels[:] = 7
    z[0, 20], z[1, 7], z[2, 30] = float("nan"), float("nan"), float("-inf")
    expected = F.cross_entropy(z.double(), labels, reduction="none")
    losses = native_cross_entropy(z, labels, 1.0, gradient=True)
    assert losses[:2].isnan().all()
    torch.testing.assert_close(losses[2].double(), expected[2], rtol=1e-6, atol=0)
    assert z[2, 30] == 0


def test_bits_do_not_depend_on_threads():
    z, labels = _logits(50, 4099)
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            mine = z.clone()
            results.append((native_cross_entropy(mine, labels, 0.3, gradient=True), mine))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_a_label_that_is_no_row_of_the_weight_is_named(monkeypatch):
    hidden, weight = torch.randn(4, 8).bfloat16(), torch.randn(20, 8).bfloat16()
    with pytest.raises(RuntimeError, match="label 20 is no row of the weight, which has 20"):
        linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 20, 3]))


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"label_smoothing": 0.1}, {"z_loss": 1e-3}])
def test_only_the_plain_loss_is_computed_here(options, monkeypatch):
    calls = []
    counted = lambda *x, **y: calls.append(x) or native_cross_entropy(*x, **y)  # noqa: E731
    monkeypatch.setattr(loss, "native_cross_entropy", counted)
    hidden, weight, labels = torch.randn(30, 16).bfloat16(), torch.randn(50, 16).bfloat16(), torch.arange(30)
    value = linear_cross_entropy(hidden, weight, labels, **options)
    assert bool(calls) == (not options)
    expected = loss.linear_cross_entropy_reference(hidden.double(), weight.double(), labels, **options)
    torch.testing.assert_close(value.double(), expected, rtol=5e-3, atol=5e-3)
