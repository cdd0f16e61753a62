"""Products in fp32 by oneDNN: right for every layout, the same under the compiler, and left alone elsewhere."""

from __future__ import annotations

import time

import pytest
import torch
from torch.testing import assert_close

from llamahome.kernels import products
from llamahome.kernels.products import add_product, add_product_, multiply

# M, K, N; some below and some above the size from which oneDNN is asked
SIZES = [(1, 3, 2), (7, 16, 5), (130, 257, 64), (16, 300, 576), (576, 300, 16), (300, 576, 192), (0, 8, 4)]
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_ONEDNN", True)


def _matrix(rows, columns, turned, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * columns)
    if turned:
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
@pytest.mark.parametrize("turned", LAYOUTS)
def test_a_product_is_that_of_float64_for_each_layout(m, k, n, turned):
    a, b, c = _matrix(m, k, turned[0]), _matrix(k, n, turned[1]), _matrix(m, n, False)
    exact = a.double() @ b.double()
    assert_close(multiply(a, b).double(), exact, rtol=1e-5, atol=1e-4)
    before = c.clone()
    assert_close(add_product(c, a, b).double(), c.double() + exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(c, before)
    assert_close(add_product_(c, a, b).double(), before.double() + exact, rtol=1e-5, atol=1e-4)


def test_turned_rows_with_gaps_take_the_quick_way():
    # oneDNN multiplies these in seconds where they are the left factor.
    z, h = _matrix(384, 20000, False)[:, :896], _matrix(384, 576, False)
    started = time.perf_counter()
    torch.mm(z.t(), h)
    usual = time.perf_counter() - started
    started = time.perf_counter()
    product = multiply(z.t(), h)
    assert time.perf_counter() - started < 50 * usual + 0.1
    assert_close(product.double(), z.double().t() @ h.double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("turned", LAYOUTS)
@pytest.mark.parametrize(("m", "k", "n"), [(300, 576, 192), (1536, 300, 16)])
def test_the_compiler_sees_what_runs(m, k, n, turned):
    a, b, c = _matrix(m, k, turned[0]), _matrix(k, n, turned[1]), _matrix(m, n, False)

    def both(a, b, c):
        return multiply(a, b) * 2, add_product(c, a, b)

    torch._dynamo.reset()
    for found, expected in zip(torch.compile(both, fullgraph=True)(a, b, c), both(a, b, c), strict=True):
        assert torch.equal(found, expected)
    torch.library.opcheck(torch.ops.llamahome.multiply.default, (a, b))
    torch.library.opcheck(torch.ops.llamahome.add_product.default, (c, a, b))


def test_other_numbers_are_left_to_torch():
    for dtype in (torch.float64, torch.bfloat16):
        a, b, c = (_matrix(64, 64, False, dtype) for _ in range(3))
        assert torch.equal(multiply(a, b), a @ b)
        assert torch.equal(add_product(c, a, b), torch.addmm(c, a, b))
        result = add_product_(c, a, b)
        assert result.data_ptr() == c.data_ptr()


def test_another_processor_takes_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "_ONEDNN", False)
    monkeypatch.setattr(products, "_multiply", None)
    a, b = _matrix(300, 576, False), _matrix(576, 192, True)
    assert torch.equal(multiply(a, b), a @ b)
