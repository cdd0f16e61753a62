"""Kernels with one fault each, and one without, for the static gate to judge; compiled by test_static.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from llamahome.kernels.launch import StaticCase


@triton.jit
def scaled(x_ptr, y_ptr, size, scale, BLOCK: tl.constexpr, CAST: tl.constexpr, WIDEN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    if WIDEN:
        x = tl.exp(x.to(tl.float64) * 3.0).to(tl.float32)
    if CAST:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + at, (x * scale).to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def strided(x_ptr, y_ptr, size, BLOCK: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * READ, mask=at < size, other=0.0)
    tl.store(y_ptr + at * WRITE, x, mask=at < size)


@triton.jit
def live(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    first = tl.load(x_ptr + at).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        x = tl.load(x_ptr + row.to(tl.int64) * BLOCK + at).to(tl.float32)
        total += x * first * tl.sum(x, 0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty))


@triton.jit
def product(x_ptr, w_ptr, y_ptr, inner, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    y = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, inner, K):
        x = tl.load(x_ptr + m[:, None] * inner + start + k[None, :])
        w = tl.load(w_ptr + n[:, None] * inner + start + k[None, :])
        y = tl.dot(x, w.T, y)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty))


def static_cases() -> list[StaticCase]:
    pointers = {"x_ptr": "*bf16", "y_ptr": "*bf16"}
    scale = {**pointers, "size": "i32", "scale": "fp32"}
    matrix = {**pointers, "w_ptr": "*bf16", "inner": "i32"}

    def case(
        name: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], warps: int = 4, stages: int = 2
    ) -> StaticCase:
        return StaticCase(name, kernel, signature, constexprs, warps, stages, ("sm_90",))

    return [
        case("good", scaled, scale, {"BLOCK": 1024, "CAST": True, "WIDEN": False}),
        case("double", scaled, scale, {"BLOCK": 1024, "CAST": True, "WIDEN": True}),
        case("fp64_scalar", scaled, scale, {"BLOCK": 1024, "CAST": False, "WIDEN": False}),
        case("narrow_load", strided, {**pointers, "size": "i32"}, {"BLOCK": 1024, "READ": 2, "WRITE": 1}),
        case("narrow_store", strided, {**pointers, "size": "i32"}, {"BLOCK": 1024, "READ": 1, "WRITE": 2}),
        case("uneven_size", scaled, {**scale, "size": "i32:1"}, {"BLOCK": 1024, "CAST": True, "WIDEN": False}),
        case("spill", live, {**pointers, "rows": "i32"}, {"BLOCK": 8192}, 2),
        case("good_dot", product, matrix, {"M": 64, "N": 64, "K": 64}),
        case("old_tensor_cores", product, matrix, {"M": 16, "N": 32, "K": 64}),
        case("too_much_shared", product, matrix, {"M": 128, "N": 128, "K": 64}, 4, 9),
        case("inner_too_small", product, matrix, {"M": 64, "N": 64, "K": 8}),
    ]
