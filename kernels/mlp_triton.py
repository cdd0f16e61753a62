"""Triton kernels of the gated unit: one read of e and g, one write of what comes out, in new tensors.

With an absorbed LoRA update the tiles are square and the rank-r products go through the tensor cores while e and g
are in registers: no pass over [T, f] of its own, and one rounding fewer than adding it first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import table_cases
from llamahome.kernels.launch import LaunchConfig, StaticCase, aligned, config_for
from llamahome.kernels.low_rank_triton import low_rank, padded
from llamahome.kernels.mlp import GatedLora
from llamahome.kernels.norm_triton import rows_of


@triton.jit
def _forward(
    e_ptr, g_ptr, xa_gate_ptr, b_gate_ptr, xa_up_ptr, b_up_ptr, h_ptr, rows, size, rank,
    e_stride, g_stride, xa_gate_stride, xa_up_stride, scaling_gate, scaling_up,
    GELU: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    e = tl.load(e_ptr + row[:, None] * e_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row[:, None] * g_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if RANK:
        here, known = row < rows, column < size
        e += low_rank(xa_gate_ptr, b_gate_ptr, row, column, here, known, rank, xa_gate_stride, scaling_gate, RANK)
        g += low_rank(xa_up_ptr, b_up_ptr, row, column, here, known, rank, xa_up_stride, scaling_up, RANK)
    h = e * _gate(e, GELU)[0] * g
    tl.store(h_ptr + row[:, None] * size + column[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dh_ptr, e_ptr, g_ptr, xa_gate_ptr, b_gate_ptr, xa_up_ptr, b_up_ptr, h_ptr, de_ptr, dg_ptr, rows, size, rank,
    dh_stride, e_stride, g_stride, xa_gate_stride, xa_up_stride, scaling_gate, scaling_up,
    GELU: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    dh = tl.load(dh_ptr + row[:, None] * dh_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    e = tl.load(e_ptr + row[:, None] * e_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row[:, None] * g_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if RANK:
        here, known = row < rows, column < size
        e += low_rank(xa_gate_ptr, b_gate_ptr, row, column, here, known, rank, xa_gate_stride, scaling_gate, RANK)
        g += low_rank(xa_up_ptr, b_up_ptr, row, column, here, known, rank, xa_up_stride, scaling_up, RANK)
    open_, bend = _gate(e, GELU)
    active = e * open_
    to = row[:, None] * size + column[None, :]
    tl.store(h_ptr + to, (active * g).to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(de_ptr + to, (dh * g * (open_ + active * bend)).to(de_ptr.dtype.element_ty), mask=inside)
    tl.store(dg_ptr + to, (dh * active).to(dg_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate(e, GELU: tl.constexpr):
    """(s, s' / s) of activation(e) = e * s(e). GELU's tanh form is e * sigmoid(2u): no tanh, no cancellation."""
    if GELU:
        slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * e * e)
        open_ = tl.sigmoid(1.5957691216057308 * e * (1.0 + 0.044715 * e * e))
        bend = (1.0 - open_) * slope
    else:
        open_ = tl.sigmoid(e)
        bend = 1.0 - open_
    return open_, bend


def forward(e: Tensor, g: Tensor, activation: str, lora: GatedLora | None) -> Tensor:
    """h; see `mlp.gated_forward`."""
    e_rows, g_rows = rows_of(e), rows_of(g)
    h = torch.empty(e.shape, dtype=e.dtype, device=e.device)
    if h.numel():
        update = _update(lora)
        config = config_for("gated", "lora" if update.rank else "rows", e)
        with torch.cuda.device_of(e):
            _forward[_grid(e_rows, config)](
                e_rows, g_rows, *update.tensors, h, *e_rows.shape, update.rank,
                e_rows.stride(0), g_rows.stride(0), *update.strides, *update.scalings,
                GELU=activation == "gelu_tanh", **_constants(config, update.rank),
            )  # fmt: skip
    return h


def backward(
    dh: Tensor, e: Tensor, g: Tensor, activation: str, lora: GatedLora | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, de, dg); see `mlp.gated_backward`."""
    dh_rows, e_rows, g_rows = rows_of(dh), rows_of(e), rows_of(g)
    h, de, dg = (torch.empty(e.shape, dtype=x.dtype, device=e.device) for x in (e, e, g))
    if h.numel():
        update = _update(lora)
        config = config_for("gated", "lora" if update.rank else "rows", e)
        with torch.cuda.device_of(e):
            _backward[_grid(e_rows, config)](
                dh_rows, e_rows, g_rows, *update.tensors, h, de, dg, *e_rows.shape, update.rank,
                dh_rows.stride(0), e_rows.stride(0), g_rows.stride(0), *update.strides, *update.scalings,
                GELU=activation == "gelu_tanh", **_constants(config, update.rank),
            )  # fmt: skip
    return h, de, dg


class _Update(NamedTuple):
    """The kernels' arguments for an absorbed LoRA update, or for none."""

    tensors: tuple[Tensor | None, ...] = (None, None, None, None)
    strides: tuple[int, int] = (0, 0)
    scalings: tuple[float, float] = (0.0, 0.0)
    rank: int = 0


def _update(lora: GatedLora | None) -> _Update:
    if lora is None:
        return _Update()
    xa_gate, b_gate, xa_up, b_up, *scalings = lora
    xa_gate, xa_up = rows_of(xa_gate), rows_of(xa_up)
    return _Update(
        (xa_gate, aligned(b_gate.contiguous()), xa_up, aligned(b_up.contiguous())),
        (xa_gate.stride(0), xa_up.stride(0)), (scalings[0], scalings[1]), b_gate.shape[1],
    )  # fmt: skip


def _grid(rows: Tensor, config: LaunchConfig) -> tuple[int, int]:
    return triton.cdiv(rows.shape[0], config.block_m), triton.cdiv(rows.shape[1], config.block_n)


def _constants(config: LaunchConfig, rank: int) -> dict[str, int]:
    return {
        "RANK": padded(rank) if rank else 0, "ROWS": config.block_m, "COLUMNS": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def static_cases() -> list[StaticCase]:
    """SwiGLU and GeGLU alone, and SwiGLU with an absorbed LoRA update of rank 16 and 64."""
    sizes = "i32 i32 i32 i32 i32 i32 i32"
    forward = f"*bf16 *bf16 {{}} *bf16 {sizes} fp32 fp32"
    backward = f"*bf16 *bf16 *bf16 {{}} *bf16 *bf16 *bf16 i32 {sizes} fp32 fp32"
    cases = []
    for name, kernel, types in (("{}", _forward, forward), ("{}_backward", _backward, backward)):
        for unit, gelu in (("swiglu", False), ("geglu", True)):
            cases += _cases(name.format(unit), kernel, types.format("- - - -"), gelu, 0)
        for rank in (16, 64):
            absorbing = types.format("*bf16 *bf16 *bf16 *bf16")
            cases += _cases(f"{name.format('swiglu')} lora {rank}", kernel, absorbing, False, rank)
    return cases


def _cases(name: str, kernel: Any, types: str, gelu: bool, rank: int) -> list[StaticCase]:
    row = "gated", "lora" if rank else "rows"
    cases: list[StaticCase] = table_cases(
        name, kernel, types, row, lambda config: {"GELU": gelu} | _constants(config, rank)
    )
    return cases
