"""Triton kernels of the RMS norm: a program holds whole rows, so that each number is read once and written once.

The weight's gradient is summed by a fixed number of programs over their rows and then over the programs, in fixed
order: no atomics, the same bits each time. With a frozen weight the kernel is compiled without it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import table_cases
from llamahome.kernels.launch import LaunchConfig, StaticCase, aligned, config_for
from llamahome.kernels.norm import empty_output

_PARTIALS = 256  # sums of the weight's gradient, at least one wave of any GPU with up to 128 processors


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, summed_ptr, rstd_ptr, rows, size, x_stride, residual_stride, eps, offset,
    ADD: tl.constexpr, SCALE_WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    at = row[:, None] * size + column[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + at, x, mask=inside)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / size + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    tl.store(
        y_ptr + at,
        scale(wide * rstd[:, None], weight, offset, x.dtype, SCALE_WIDE).to(y_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _apply(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, rows, size, x_stride, offset,
    SCALE_WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    y = scale(x.to(tl.float32) * rstd[:, None], weight, offset, x.dtype, SCALE_WIDE)
    tl.store(y_ptr + row[:, None] * size + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale(hat, weight, offset, dtype: tl.constexpr, SCALE_WIDE: tl.constexpr):  # noqa: ANN201
    return hat * (weight + tl.cast(offset, tl.float32)) if SCALE_WIDE else hat.to(dtype).to(tl.float32) * weight


@triton.jit
def _backward(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, d_residual_ptr, dx_ptr, partial_ptr,
    rows, size, dy_stride, x_stride, d_residual_stride, offset, rows_each,
    ADD: tl.constexpr, COMPUTE_DW: tl.constexpr, SCALE_WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    if SCALE_WIDE:
        weight += tl.cast(offset, tl.float32)
    partial = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows_each, ROWS):
        row = program * rows_each + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        hat = x.to(tl.float32) * rstd
        scaled = dy * weight[None, :]
        dx = rstd * (scaled - hat * (tl.sum(scaled * hat, 1) / size)[:, None])
        if ADD:
            dx += tl.load(
                d_residual_ptr + row[:, None] * d_residual_stride + column[None, :], mask=inside, other=0.0
            ).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * size + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if COMPUTE_DW:
            used = hat if SCALE_WIDE else hat.to(x.dtype).to(tl.float32)
            partial += tl.sum(dy * used, 0)
    if COMPUTE_DW:
        tl.store(partial_ptr + program * size + column, partial, mask=column < size)


def forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, rstd, x + residual or None); see `norm.rms_norm_forward`."""
    flat, others = rows_of(x), None if residual is None else rows_of(residual)
    count, size = flat.shape
    summed = None if residual is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = empty_output(x if summed is None else summed, weight, offset)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    config = _config(flat)
    if count:
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(count, config.block_m),)](
                flat, others, aligned(weight), y, summed, rstd, count, size, flat.stride(0),
                others.stride(0) if others is not None else 0, eps, offset,
                ADD=residual is not None, SCALE_WIDE=bool(offset), **_resources(config),
            )  # fmt: skip
    return y, rstd, summed


def apply(x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """y again; see `norm.rms_norm_apply`."""
    flat = rows_of(x)
    count, size = flat.shape
    y: Tensor = empty_output(x, weight, offset)
    config = _config(flat)
    if count:
        with torch.cuda.device_of(x):
            _apply[(triton.cdiv(count, config.block_m),)](
                flat, aligned(weight), y, rstd.contiguous(), count, size, flat.stride(0), offset,
                SCALE_WIDE=bool(offset), **_resources(config),
            )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, need_weight: bool, d_residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(dx, d_weight or None); see `norm.rms_norm_backward`."""
    dy_rows, x_rows = rows_of(dy), rows_of(x)
    others = None if d_residual is None else rows_of(d_residual)
    count, size = x_rows.shape
    dx = x.new_empty(x.shape)
    config = _config(x_rows)
    blocks = max(1, triton.cdiv(count, config.block_m))
    rows_each = config.block_m * (triton.cdiv(blocks, _PARTIALS) if need_weight else 1)
    programs = triton.cdiv(count, rows_each)
    partial = x.new_empty(programs, size, dtype=torch.float32) if need_weight else None
    if count:
        with torch.cuda.device_of(x):
            _backward[(programs,)](
                dy_rows, x_rows, aligned(weight), rstd.contiguous(), others, dx, partial, count, size,
                dy_rows.stride(0), x_rows.stride(0), others.stride(0) if others is not None else 0, offset, rows_each,
                ADD=others is not None, COMPUTE_DW=need_weight, SCALE_WIDE=bool(offset), **_resources(config),
            )  # fmt: skip
    return dx, None if partial is None else partial.sum(0).to(weight.dtype)


def rows_of(x: Tensor) -> Tensor:
    """[rows, h] with neighbouring columns side by side; a copy only where the loads would be narrow without it."""
    rows: Tensor = aligned(x.reshape(-1, x.shape[-1]))
    return rows


def _config(rows: Tensor) -> LaunchConfig:
    return config_for("rms_norm", str(triton.next_power_of_2(rows.shape[1])), rows)


def _resources(config: LaunchConfig) -> dict[str, int]:
    return {
        "ROWS": config.block_m, "BLOCK": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def static_cases() -> list[StaticCase]:
    """Llama-3-8B's norm with and without a residual, Gemma's, a head's, and the backward pass with either weight."""
    forward = "*bf16 {0} *bf16 *bf16 {0} *fp32 i32 i32 i32 i32 fp32 fp32"
    backward = "*bf16 *bf16 *bf16 *fp32 {} *bf16 {} i32 i32 i32 i32 i32 fp32 i32"
    plain, gemma = {"ADD": False, "SCALE_WIDE": False}, {"ADD": True, "SCALE_WIDE": True}
    frozen = {"ADD": True, "COMPUTE_DW": False, "SCALE_WIDE": False}
    apply_types = "*bf16 *bf16 *bf16 *fp32 i32 i32 i32 fp32"
    return [
        *_cases("rms_norm 4096", _forward, forward.format("-"), plain, 4096),
        *_cases("rms_norm 128", _forward, forward.format("-"), plain, 128),
        *_cases("add_rms_norm 4096", _forward, forward.format("*bf16"), gemma, 4096),
        *_cases("rms_norm_apply 4096", _apply, apply_types, {"SCALE_WIDE": False}, 4096),
        *_cases("rms_norm_backward 4096", _backward, backward.format("*bf16", "-"), frozen, 4096),
        *_cases(
            "rms_norm_backward 4096 weight", _backward, backward.format("*bf16", "*fp32"),
            frozen | {"COMPUTE_DW": True}, 4096,
        ),
    ]  # fmt: skip


def _cases(name: str, kernel: Any, types: str, constants: dict[str, Any], size: int) -> list[StaticCase]:
    row = "rms_norm", str(size)
    cases: list[StaticCase] = table_cases(name, kernel, types, row, lambda config: constants | _resources(config))
    return cases
