"""Triton kernel: residual addition, RMS norm and the rank-r part of the projection before them.

Sixteen rows share one reading of b, a tile of columns at a time: with fewer, b would be read from the cache more often
than the saved pass over the rows is worth. The sum is written, and read once more from the cache for its scaling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import table_cases
from llamahome.kernels.launch import LaunchConfig, StaticCase, aligned, config_for
from llamahome.kernels.low_rank import LowRank
from llamahome.kernels.low_rank_triton import low_rank, operands, padded
from llamahome.kernels.norm import empty_output
from llamahome.kernels.norm_triton import rows_of, scale


@triton.jit
def _add_norm_lora(
    x_ptr, residual_ptr, weight_ptr, xa_ptr, b_ptr, y_ptr, summed_ptr, rstd_ptr,
    rows, size, x_stride, residual_stride, rank, xa_stride, scaling, eps, offset,
    SCALE_WIDE: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        x += low_rank(xa_ptr, b_ptr, row, column, row < rows, column < size, rank, xa_stride, scaling, RANK)
        summed = (x + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row[:, None] * size + column[None, :], summed, mask=inside)
        wide = tl.where(inside, summed.to(tl.float32), 0.0)
        total += tl.sum(wide * wide, 1)
    rstd = tl.rsqrt(total / size + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    tl.debug_barrier()  # other threads of this program wrote what is read now
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        at = row[:, None] * size + column[None, :]
        summed = tl.load(summed_ptr + at, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
        y = scale(summed.to(tl.float32) * rstd[:, None], weight[None, :], offset, summed.dtype, SCALE_WIDE)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, update: LowRank
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, rstd, x + update + residual); see `norm.rms_norm_forward`."""
    flat, others = rows_of(x), rows_of(residual)
    count, size = flat.shape
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = empty_output(summed, weight, offset)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if count:
        xa, b, rank, xa_stride, scaling = operands(update)
        config = config_for("add_rms_norm", "lora", x)
        with torch.cuda.device_of(x):
            _add_norm_lora[(triton.cdiv(count, config.block_m),)](
                flat, others, aligned(weight), xa, b, y, summed, rstd, count, size,
                flat.stride(0), others.stride(0), rank, xa_stride, scaling, eps, offset,
                SCALE_WIDE=bool(offset), **_constants(config, rank),
            )  # fmt: skip
    return y, rstd, summed


def _constants(config: LaunchConfig, rank: int) -> dict[str, int]:
    return {
        "RANK": padded(rank), "ROWS": config.block_m, "COLUMNS": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def static_cases() -> list[StaticCase]:
    """Llama-3-8B's, of rank 16 and 64."""
    types = "*bf16 *bf16 *bf16 *bf16 *bf16 *bf16 *bf16 *fp32 i32 i32 i32 i32 i32 i32 fp32 fp32 fp32"
    row = "add_rms_norm", "lora"
    return [
        *table_cases(
            "add_rms_norm lora 16", _add_norm_lora, types, row, lambda c: {"SCALE_WIDE": False} | _constants(c, 16)
        ),
        *table_cases(
            "add_rms_norm lora 64", _add_norm_lora, types, row, lambda c: {"SCALE_WIDE": False} | _constants(c, 64)
        ),
    ]
