"""Products by oneDNN and by our own kernel: right for every layout, the same under the compiler, torch's elsewhere."""

from __future__ import annotations

import time

import pytest
import torch
from torch.testing import assert_close

from llamahome import _C
from llamahome.kernels import products
from llamahome.kernels.products import add_product_, multiply, sum_products

# M, K, N; some below and some above the size from which a library of ours is asked
SIZES = [(1, 3, 2), (7, 16, 5), (130, 257, 64), (16, 300, 576), (576, 300, 16), (300, 576, 192), (0, 8, 4)]
SIZES_16 = [*SIZES, (16, 1501, 112), (48, 5000, 80), (100, 20003, 80), (48, 20004, 80), (61, 576, 1552)]
SIZES_16 += [(957, 1536, 16), (1536, 957, 48)]
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]
EXACTNESS = {torch.float32: {"rtol": 1e-5, "atol": 3e-4}, torch.bfloat16: {"rtol": 0.01, "atol": 0.2}}

needs_native = pytest.mark.skipif(not _C.has_avx512_bf16(), reason="needs a processor with AVX512-BF16")


@pytest.fixture(autouse=True)
def own(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_ONEDNN", True)
    monkeypatch.setattr(products, "_NATIVE", _C.has_avx512_bf16())


def _matrix(rows, columns, turned=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(rows * columns + seed)
    if turned:
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    return torch.randn(rows, columns, generator=generator).to(dtype)


def _native_calls(monkeypatch):
    """The shapes that our own kernel is asked for."""
    calls, kernel = [], products._sum_native

    def counted(start, lefts, rights):
        calls.append([(*a.shape, b.shape[1]) for a, b in zip(lefts, rights, strict=True)])
        return kernel(start, lefts, rights)

    monkeypatch.setattr(products, "_sum_native", counted)
    return calls


@pytest.mark.parametrize(
    ("dtype", "sizes"), [*((torch.float32, x) for x in SIZES), *((torch.bfloat16, x) for x in SIZES_16)]
)
@pytest.mark.parametrize("turned", LAYOUTS)
def test_a_product_is_that_of_float64_for_each_layout(dtype, sizes, turned):
    m, k, n = sizes
    a, b, c = _matrix(m, k, turned[0], dtype), _matrix(k, n, turned[1], dtype), _matrix(m, n, False, dtype)
    exact = a.double() @ b.double()
    assert_close(multiply(a, b).double(), exact, **EXACTNESS[dtype])
    before = c.clone()
    assert_close(sum_products([(a, b)], c).double(), c.double() + exact, **EXACTNESS[dtype])
    assert torch.equal(c, before)
    assert_close(add_product_(c, a, b).double(), before.double() + exact, **EXACTNESS[dtype])


@pytest.mark.parametrize("dtype", EXACTNESS)
@pytest.mark.parametrize("residual", [False, True])
def test_several_products_are_summed(dtype, residual):
    pairs = [
        (_matrix(301, k, False, dtype, seed=k), _matrix(k, 592, turned, dtype, seed=k))
        for k, turned in ((16, True), (1536, False), (600, True), (2, False))
    ]
    start = _matrix(301, 592, False, dtype) if residual else None
    exact = sum(a.double() @ b.double() for a, b in pairs) + (0 if start is None else start.double())
    assert_close(sum_products(pairs, start).double(), exact, **EXACTNESS[dtype])


@needs_native
def test_our_own_kernel_rounds_a_sum_once(monkeypatch):
    calls = _native_calls(monkeypatch)
    x, weight = _matrix(200, 576, False, torch.bfloat16), _matrix(192, 576, False, torch.bfloat16)
    xa, b = _matrix(200, 16, False, torch.bfloat16), _matrix(192, 16, False, torch.bfloat16) * 2e-4
    residual = _matrix(200, 192, False, torch.bfloat16)
    exact = xa.double() @ b.double().T + x.double() @ weight.double().T + residual.double()
    found = sum_products([(xa, b.T), (x, weight.T)], residual)
    assert calls == [[(200, 16, 192), (200, 576, 192)]]
    half_digit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 8)
    # Sums in fp32 go wrong by far less than a digit of bf16.
    assert ((found.double() - exact).abs() <= half_digit + 1e-4).all()


@needs_native
def test_too_few_rows_for_it_still_take_small_products_first(monkeypatch):
    calls = _native_calls(monkeypatch)
    x, weight, residual = (_matrix(*shape, dtype=torch.bfloat16) for shape in ((20, 576), (192, 576), (20, 192)))
    xa, b = _matrix(20, 16, dtype=torch.bfloat16), _matrix(192, 16, dtype=torch.bfloat16) * 2e-4
    expected = residual + torch.addmm(xa @ b.T, x, weight.T)
    assert torch.equal(sum_products([(xa, b.T), (x, weight.T)], residual), expected)
    assert not calls


@needs_native
def test_its_bits_depend_on_neither_threads_nor_other_rows(monkeypatch):
    calls = _native_calls(monkeypatch)
    a, b, c = (_matrix(*x, dtype=torch.bfloat16) for x in ((1003, 3000), (3000, 208), (1003, 208)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sum_products([(a, b)], c)
        torch.set_num_threads(3)
        assert torch.equal(sum_products([(a, b)], c), one)
    finally:
        torch.set_num_threads(threads)
    for rows in (48, 61, 500):
        assert torch.equal(sum_products([(a[:rows], b)], c[:rows].contiguous()), one[:rows])
    assert len(calls) == 5


@needs_native
def test_views_with_gaps_are_read_where_they_lie(monkeypatch):
    calls = _native_calls(monkeypatch)
    part = torch.split(_matrix(300, 96, dtype=torch.bfloat16), 48, -1)[1]
    x, d_out = _matrix(300, 1536, dtype=torch.bfloat16), _matrix(300, 640, dtype=torch.bfloat16)[:, 64:]
    odd = _matrix(300, 577, dtype=torch.bfloat16)[:, 1:]  # its rows do not begin with whole pairs
    weight = _matrix(304, 576, dtype=torch.bfloat16)
    for a, b in ((part.T, x), (part, x[:48]), (d_out, weight.T), (part.T, odd), (odd, weight.T)):
        assert_close(multiply(a, b).double(), a.double() @ b.double(), **EXACTNESS[torch.bfloat16])
    assert calls == [[(48, 300, 1536)], [(300, 48, 1536)], [(300, 576, 304)], [(48, 300, 576)]]


@needs_native
def test_the_kernel_refuses_what_it_cannot_read():
    memory = torch.zeros(64 * 64, dtype=torch.bfloat16)
    at = memory.data_ptr()
    for left, right, size, rows, columns, message in (
        ((at, 16, False), (at, 32, False), 16, 48, 30, "columns"),
        ((at, 47, True), (at, 32, False), 16, 47, 32, "rows"),
        ((at, 16, False), (at, 32, False), 15, 48, 32, "pairs"),
        ((at, 17, False), (at, 32, False), 16, 48, 32, "pairs"),
        ((at + 2, 16, False), (at, 32, False), 16, 48, 32, "pairs"),
        ((at, 16, False), (at + 2, 16, True), 16, 48, 32, "pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.sum_products([(left, right, size)], None, at, rows, columns, 1)


@needs_native
def test_a_tensor_that_was_read_can_still_be_resized():
    x, weight = _matrix(300, 576, dtype=torch.bfloat16), _matrix(576, 192, dtype=torch.bfloat16)
    multiply(x, weight)
    weight.untyped_storage().resize_(0)  # FSDP2 does, with each layer's gathered weights


def test_turned_rows_with_gaps_take_the_quick_way():
    # oneDNN multiplies these in seconds where they are the left factor.
    z, h = _matrix(384, 20000)[:, :896], _matrix(384, 576)
    started = time.perf_counter()
    torch.mm(z.t(), h)
    usual = time.perf_counter() - started
    started = time.perf_counter()
    product = multiply(z.t(), h)
    assert time.perf_counter() - started < 50 * usual + 0.1
    assert_close(product.double(), z.double().t() @ h.double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", EXACTNESS)
@pytest.mark.parametrize("turned", LAYOUTS)
@pytest.mark.parametrize(("m", "k", "n"), [(300, 576, 192), (1536, 300, 16)])
def test_the_compiler_sees_what_runs(m, k, n, turned, dtype):
    a, b, c = _matrix(m, k, turned[0], dtype), _matrix(k, n, turned[1], dtype), _matrix(m, n, False, dtype)

    def both(a, b, c):
        return multiply(a, b) * 2, sum_products([(a, b)], c)

    torch._dynamo.reset()
    for found, expected in zip(torch.compile(both, fullgraph=True)(a, b, c), both(a, b, c), strict=True):
        assert torch.equal(found, expected)
    torch.library.opcheck(torch.ops.llamahome.sum_products.default, (None, [a], [b]))
    torch.library.opcheck(torch.ops.llamahome.sum_products.default, (c, [a, a], [b, b]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_are_left_to_torch(dtype, monkeypatch):
    monkeypatch.setattr(products, "_NATIVE", False)
    a, b, c, d = (_matrix(64, 64, False, dtype, seed) for seed in range(4))
    assert torch.equal(multiply(a, b), a @ b)
    assert torch.equal(sum_products([(a, b)], c), torch.addmm(c, a, b))
    assert torch.equal(sum_products([(a, b), (d, b)], c), c + torch.addmm(a @ b, d, b))
    result = add_product_(c, a, b)
    assert result.data_ptr() == c.data_ptr()


def test_another_processor_takes_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "_ONEDNN", False)
    monkeypatch.setattr(products, "_NATIVE", False)
    monkeypatch.setattr(products, "_sum", None)
    for dtype in EXACTNESS:
        a, b = _matrix(300, 576, False, dtype), _matrix(576, 192, True, dtype)
        assert torch.equal(multiply(a, b), a @ b)
