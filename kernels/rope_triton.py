"""Triton kernel of the rotary embedding: a program turns one token's heads, whose cos and sin it loads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import table_cases
from llamahome.kernels.launch import LaunchConfig, StaticCase, aligned, config_for
from llamahome.kernels.low_rank import LowRank
from llamahome.kernels.low_rank_triton import low_rank, operands, padded


@triton.jit
def _rope(
    x_ptr, cos_ptr, sin_ptr, y_ptr, heads, x_token, x_head, cos_stride, sin_stride,
    HALF: tl.constexpr, REST: tl.constexpr, INVERSE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    width: tl.constexpr = 2 * HALF + REST
    known = column < HALF
    cos = tl.load(cos_ptr + token * cos_stride + column, mask=known, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * sin_stride + column, mask=known, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    inside = (head < heads)[:, None] & known[None, :]
    x = x_ptr + token * x_token + head[:, None] * x_head + column[None, :]
    y = y_ptr + (token * heads + head)[:, None] * width + column[None, :]
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(y, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)
    if REST:
        after = tl.arange(0, REST_BLOCK)
        passed = (head < heads)[:, None] & (after < REST)[None, :]
        x = x_ptr + token * x_token + head[:, None] * x_head + 2 * HALF + after[None, :]
        y = y_ptr + (token * heads + head)[:, None] * width + 2 * HALF + after[None, :]
        tl.store(y, tl.load(x, mask=passed, other=0.0), mask=passed)


@triton.jit
def _rope_lora(
    x_ptr, cos_ptr, sin_ptr, xa_ptr, b_ptr, y_ptr, tokens, heads, x_token, x_head, cos_stride, sin_stride,
    rank, xa_stride, scaling,
    HALF: tl.constexpr, INVERSE: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here, known = token < tokens, column < HALF
    inside = here[:, None] & known[None, :]
    x = x_ptr + token[:, None] * x_token + head * x_head + column[None, :]
    row_of_b = head * (2 * HALF) + column
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    first += low_rank(xa_ptr, b_ptr, token, row_of_b, here, known, rank, xa_stride, scaling, RANK)
    second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    second += low_rank(xa_ptr, b_ptr, token, row_of_b + HALF, here, known, rank, xa_stride, scaling, RANK)
    cos = tl.load(cos_ptr + token[:, None] * cos_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token[:, None] * sin_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    y = y_ptr + (token[:, None] * heads + head) * (2 * HALF) + column[None, :]
    tl.store(y, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)


def apply_with_update(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, update: LowRank) -> Tensor:
    """x and its rank-r part turned, all of a head; see `rope.rope_apply`."""
    x, cos, sin = aligned(x), aligned(cos), aligned(sin)
    tokens, heads, size = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        xa, b, rank, xa_stride, scaling = operands(update)
        config = config_for("rope", "lora", x)
        with torch.cuda.device_of(x):
            _rope_lora[(triton.cdiv(tokens, config.block_m), heads)](
                x, cos, sin, xa, b, y, tokens, heads, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
                rank, xa_stride, scaling, INVERSE=inverse, **_lora_constants(config, size // 2, rank),
            )  # fmt: skip
    return y


def _lora_constants(config: LaunchConfig, half: int, rank: int) -> dict[str, int]:
    return {
        "HALF": half, "RANK": padded(rank), "ROWS": config.block_m, "BLOCK": max(16, triton.next_power_of_2(half)),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def apply(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x turned; see `rope.rope_apply`. x may be a view with any strides but the last."""
    x, cos, sin = aligned(x), aligned(cos), aligned(sin)
    tokens, heads, size = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = cos.shape[-1] // 2
    constants = _constants(config_for("rope", "heads", x), half, size - 2 * half, heads)
    if y.numel():
        with torch.cuda.device_of(x):
            _rope[(tokens, triton.cdiv(heads, constants["HEADS"]))](
                x, cos, sin, y, heads, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
                INVERSE=inverse, **constants,
            )  # fmt: skip
    return y


def _constants(config: LaunchConfig, half: int, rest: int, heads: int) -> dict[str, int]:
    """A thread has eight numbers of each half, one wide load."""
    tile = min(config.block_m, triton.next_power_of_2(heads))
    return {
        "HALF": half, "REST": rest, "HEADS": tile, "BLOCK": triton.next_power_of_2(half),
        "REST_BLOCK": triton.next_power_of_2(max(rest, 1)),
        "num_warps": max(1, min(config.num_warps, tile * half // 256)), "num_stages": config.num_stages,
    }  # fmt: skip


def static_cases() -> list[StaticCase]:
    """Llama-3-8B's queries, forward, and Phi-3-small's partly turned heads, backward."""
    types = "*bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32 i32"
    lora_types = "*bf16 *bf16 *bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32 i32 i32 i32 i32 fp32"
    heads, lora = ("rope", "heads"), ("rope", "lora")
    forward, inverse = {"INVERSE": False}, {"INVERSE": True}
    return [
        *table_cases("rope 32x128", _rope, types, heads, lambda c: forward | _constants(c, 64, 0, 32)),
        *table_cases("rope 32x128 partial", _rope, types, heads, lambda c: inverse | _constants(c, 32, 64, 32)),
        *table_cases("rope 128 lora 16", _rope_lora, lora_types, lora, lambda c: forward | _lora_constants(c, 64, 16)),
        *table_cases("rope 128 lora 64", _rope_lora, lora_types, lora, lambda c: forward | _lora_constants(c, 64, 64)),
    ]
