"""Triton kernel of a LoRA linear layer on few rows: x @ W.T + bias + scaling * (x @ A.T) @ B.T in one launch.

For up to 256 rows the reading of W is what the product costs, and two launches less are felt; x @ A.T is summed in the
same loop, by every program for itself. A weight in 4 bits is read so and made dense a tile at a time, with the bits of
the dense weight: up to 64 rows that is a ninth of the bytes that making it whole first moves. With more rows the extra
tensor-core work and the distance to cuBLAS cost more than the launches, and the compositions of `lora.py` are the
better ones.

Shapes: x [M, K], weight [N, K], bias [N], a [r, K], b [N, r].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import table_cases
from llamahome.kernels.launch import LaunchConfig, StaticCase, aligned, config_for
from llamahome.kernels.low_rank_triton import padded
from llamahome.kernels.nf4 import NESTED_BLOCK, Nf4Weight
from llamahome.kernels.nf4_triton import nf4_tile, tile_constants, tile_operands

MAX_ROWS = 256
_DEPTH = 64  # of x and W, in one step


@triton.jit
def _small(
    x_ptr, weight_ptr, absmax_ptr, code_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr,
    bias_ptr, a_ptr, b_ptr, y_ptr, xa_ptr, rows, columns, depth, rank,
    x_stride, weight_stride, a_stride, b_stride, scaling,
    RANK: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
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
        if BLOCK:
            weight = nf4_tile(
                weight_ptr, absmax_ptr, code_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, column, start,
                columns, depth, x.dtype, NESTED, NESTED_BLOCK, BLOCK, DEPTH,
            )  # fmt: skip
        else:
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


def fits(x: Tensor, weight: Tensor | Nf4Weight) -> bool:
    """Whether x [..., K] has few enough rows that one kernel beats a library's product and two small ones.

    A row of a weight in 4 bits must consist of whole steps, each under one scale.
    """
    whole = not isinstance(weight, Nf4Weight) or not (weight.shape[1] % _DEPTH or weight.block % _DEPTH)
    return whole and x.dtype != torch.float64 and 0 < x.numel() <= MAX_ROWS * x.shape[-1]


def lora_linear(
    x: Tensor, weight: Tensor | Nf4Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(y [M, N], x @ a.T [M, r], not scaled, for the backward pass), in x's dtype; without autograd."""
    x, a, b = aligned(x), aligned(a), aligned(b)
    rows, depth = x.shape
    columns, rank = b.shape
    y, xa = x.new_empty(rows, columns), x.new_empty(rows, rank)
    operands, stride, shape, constants = _weight(weight)
    config = config_for("lora_linear", shape, x)
    if y.numel():
        with torch.cuda.device_of(x):
            _small[(triton.cdiv(columns, config.block_n), triton.cdiv(rows, config.block_m))](
                x, *operands, bias, a, b, y, xa, rows, columns, depth, rank,
                x.stride(0), stride, a.stride(0), b.stride(0), scaling,
                BIAS=bias is not None, **constants, **_tile(config, rank),
            )  # fmt: skip
    return y, xa


def _weight(weight: Tensor | Nf4Weight) -> tuple[tuple[Tensor | None, ...], int, str, dict[str, int]]:
    """The kernel's pointers, stride, shape class in the launch table, and constants for a weight."""
    if isinstance(weight, Nf4Weight):
        return tile_operands(weight), 0, "few_rows_nf4", tile_constants(weight)
    dense = aligned(weight)
    return (dense, *[None] * 5), dense.stride(0), "few_rows", _DENSE


_DENSE = {"BLOCK": 0, "NESTED": False, "NESTED_BLOCK": NESTED_BLOCK}


def _tile(config: LaunchConfig, rank: int) -> dict[str, int]:
    return {
        "RANK": padded(rank), "ROWS": config.block_m, "COLUMNS": config.block_n, "DEPTH": _DEPTH,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def static_cases() -> list[StaticCase]:
    """Dense and 4-bit weights, with largest values in fp32 and, as QLoRA has them, in 8 bits."""
    rest = "- *bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32 i32 i32 i32 i32 fp32"
    dense = f"*bf16 *bf16 - - - - - {rest}"
    plain, nested = f"*bf16 *u8 *fp32 *fp32 - - - {rest}", f"*bf16 *u8 *u8 *fp32 *fp32 *fp32 *fp32 {rest}"
    packed = _DENSE | {"BLOCK": 64}
    return [
        *_cases("lora small 16", dense, "few_rows", _DENSE, 16),
        *_cases("lora small 64", dense, "few_rows", _DENSE, 64),
        *_cases("lora small nf4 16", plain, "few_rows_nf4", packed, 16),
        *_cases("lora small nf4 nested 16", nested, "few_rows_nf4", packed | {"NESTED": True}, 16),
        *_cases("lora small nf4 nested 64", nested, "few_rows_nf4", packed | {"NESTED": True}, 64),
    ]


def _cases(name: str, types: str, shape: str, constants: dict[str, int], rank: int) -> list[StaticCase]:
    given = {"BIAS": False} | constants
    row = "lora_linear", shape
    cases: list[StaticCase] = table_cases(name, _small, types, row, lambda config: given | _tile(config, rank))
    return cases
