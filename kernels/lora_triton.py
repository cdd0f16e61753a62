"""Triton kernel of a LoRA linear layer on few rows: x @ W.T + bias + scaling * (x @ A.T) @ B.T in one launch.

For up to 256 rows the reading of W is what the product costs, and two launches less are felt; x @ A.T is summed in the
same loop, by every program for itself. With more rows the extra tensor-core work and the distance to cuBLAS cost more
than the launches, and the compositions of `lora.py` are the better ones.

Shapes: x [M, K], weight [N, K], bias [N], a [r, K], b [N, r].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import static_case
from llamahome.kernels.launch import StaticCase, aligned
from llamahome.kernels.low_rank_triton import padded

MAX_ROWS = 256
_ROWS, _COLUMNS, _DEPTH, _STAGES = 64, 32, 64, 4  # narrow tiles, so that all processors stream rows of W


@triton.jit
def _small(
    x_ptr, weight_ptr, bias_ptr, a_ptr, b_ptr, y_ptr, xa_ptr, rows, columns, depth, rank,
    x_stride, weight_stride, a_stride, b_stride, scaling,
    RANK: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    k = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    xa = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, depth, DEPTH):
        at = start + k
        inside = (at < depth)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + at[None, :], mask=(row < rows)[:, None] & inside, other=0.0)
        weight = tl.load(
            weight_ptr + column[:, None] * weight_stride + at[None, :],
            mask=(column < columns)[:, None] & inside, other=0.0,
        )  # fmt: skip
        a = tl.load(a_ptr + r[:, None] * a_stride + at[None, :], mask=(r < rank)[:, None] & inside, other=0.0)
        acc = tl.dot(x, weight.to(x.dtype).T, acc, input_precision="ieee")
        xa = tl.dot(x, a.to(x.dtype).T, xa, input_precision="ieee")
    low = xa.to(x_ptr.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(xa_ptr + row[:, None] * rank + r[None, :], low, mask=(row < rows)[:, None] & (r < rank)[None, :])
    b = tl.load(
        b_ptr + column[:, None] * b_stride + r[None, :],
        mask=(column < columns)[:, None] & (r < rank)[None, :], other=0.0,
    )  # fmt: skip
    acc += tl.dot(low, b.to(low.dtype).T, input_precision="ieee") * tl.cast(scaling, tl.float32)
    if BIAS:
        acc += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    to = y_ptr + row[:, None] * columns + column[None, :]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


def fits(x: Tensor) -> bool:
    """Whether x [..., K] has few enough rows that one kernel beats a library's product and two small ones."""
    return x.dtype != torch.float64 and 0 < x.numel() <= MAX_ROWS * x.shape[-1]


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(y [M, N], x @ a.T [M, r], not scaled, for the backward pass), in x's dtype; without autograd."""
    x, weight, a, b = (aligned(tensor) for tensor in (x, weight, a, b))
    rows, depth = x.shape
    columns, rank = b.shape
    y, xa = x.new_empty(rows, columns), x.new_empty(rows, rank)
    if y.numel():
        _small[(triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS))](
            x, weight, bias, a, b, y, xa, rows, columns, depth, rank,
            x.stride(0), weight.stride(0), a.stride(0), b.stride(0), scaling,
            BIAS=bias is not None, **_tile(rank), num_warps=4, num_stages=_STAGES,
        )  # fmt: skip
    return y, xa


def _tile(rank: int) -> dict[str, int]:
    return {
        "RANK": padded(rank),
        "ROWS": _ROWS, "COLUMNS": _COLUMNS, "DEPTH": _DEPTH,
    }  # fmt: skip


def static_cases() -> list[StaticCase]:
    types = "*bf16 *bf16 - *bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32 i32 i32 i32 i32 fp32"
    return [
        static_case(f"lora small {rank}", _small, types, {"BIAS": False} | _tile(rank), num_warps=4, num_stages=_STAGES)
        for rank in (16, 64)
    ]
