"""The interpreter's bfloat16 is torch's, bit for bit in casts and to rounding in arithmetic."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

N = 4096


@triton.jit
def _cast(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _truncate(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def _binary(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "truediv":
        out = (x / y).to(tl.bfloat16)
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "where":
        out = tl.where(x > y, x, y)
    tl.store(out_ptr + i, out)


@triton.jit
def _unary(x_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "exp":
        out = tl.exp(x.to(tl.float32)).to(tl.bfloat16)
    tl.store(out_ptr + i, out)


@triton.jit
def _reduce(x_ptr, out_ptr, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i)
    out = tl.sum(x, 1) if OP == "sum" else tl.max(x, 1)
    tl.store(out_ptr + tl.arange(0, M), out.to(tl.bfloat16))


@triton.jit
def _dot(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    out = tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i))
    tl.store(out_ptr + i, out)


def _patterns() -> torch.Tensor:
    """fp32 values whose upper and lower halves are everything that rounding meets: ties, subnormals, inf, NaN."""
    upper = np.random.default_rng(0).integers(0, 1 << 16, N, dtype=np.uint32)
    upper[:8] = [0x0000, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0xFF7F]
    lower = np.resize(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32), N)
    return torch.from_numpy(((upper << 16) | lower).view(np.float32))


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.contiguous().view(torch.int16) == b.contiguous().view(torch.int16)
    return bool((same | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_rounding_to_bf16_is_torchs(dtype):
    values = _patterns()
    x = torch.arange(-(N // 2), N // 2) * 77 if dtype == torch.int32 else values
    x = x.to(dtype)
    y = torch.zeros(N, dtype=torch.bfloat16)
    _cast[(1,)](x, y, N)
    assert _same_bits(y, x.bfloat16())
    assert y.isfinite().sum() > N // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_leaving_bf16_is_torchs(dtype):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[:: (1 << 16) // N].contiguous()
    y = torch.zeros(N, dtype=dtype)
    with np.errstate(all="ignore"):
        _cast[(1,)](x, y, N)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_truncation_cuts_the_lower_half():
    x = _patterns()[8:].nan_to_num()
    x = torch.cat([x, x[:8]])
    y = torch.zeros(N, dtype=torch.bfloat16)
    _truncate[(1,)](x, y, N)
    assert torch.equal(y.view(torch.int16).int(), x.view(torch.int32) >> 16)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "maximum", "where"])
def test_arithmetic_rounds_once(name):
    x, y = _random(N), _random(N, seed=1)
    out = torch.zeros(N, dtype=torch.bfloat16)
    _binary[(1,)](x, y, out, name, N)
    function = torch.maximum if name in ("maximum", "where") else getattr(operator, name)
    assert _same_bits(out, function(x.double(), y.double()).bfloat16())


@pytest.mark.parametrize(("name", "function"), [("neg", operator.neg), ("abs", torch.abs), ("exp", torch.exp)])
def test_functions_of_one_number(name, function):
    x = _random(N)
    out = torch.zeros(N, dtype=torch.bfloat16)
    _unary[(1,)](x, out, name, N)
    assert _same_bits(out, function(x.float()).bfloat16())


@pytest.mark.parametrize("name", ["sum", "max"])
def test_reductions(name):
    x = _random(64, 64)
    out = torch.zeros(64, dtype=torch.bfloat16)
    _reduce[(1,)](x, out, name, 64, 64)
    exact = x.double().sum(1) if name == "sum" else x.double().amax(1)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


def test_dot_products_equal_float64():
    a, b, c = _random(64, 64), _random(64, 64, seed=1), _random(64, 64, seed=2).float()
    out = torch.zeros(64, 64)
    _dot[(1,)](a, b, c, out, 64)
    exact = a.double() @ b.double() + c.double()
    assert ((out.double() - exact).norm() / exact.norm()).item() < 1e-6
