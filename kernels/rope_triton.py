"""Triton kernel of the rotary embedding: a program turns one token's heads, whose cos and sin it loads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import static_case
from llamahome.kernels.launch import StaticCase
from llamahome.kernels.low_rank import LowRank
from llamahome.kernels.low_rank_triton import low_rank, operands, padded

_HEADS = 32  # at most, per program
_ROWS, _LORA_WARPS = 64, 8  # tokens of one head with a rank-r part: the fewest that use an H100's tensor cores


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
    x, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, cos, sin))
    tokens, heads, size = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        xa, b, rank, xa_stride, scaling = operands(update)
        _rope_lora[(triton.cdiv(tokens, _ROWS), heads)](
            x, cos, sin, xa, b, y, tokens, heads, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
            rank, xa_stride, scaling, **_lora_constants(size // 2, rank), INVERSE=inverse, num_warps=_LORA_WARPS,
        )  # fmt: skip
    return y


def _lora_constants(half: int, rank: int) -> dict[str, int]:
    return {"HALF": half, "RANK": padded(rank), "ROWS": _ROWS, "BLOCK": max(16, triton.next_power_of_2(half))}


def apply(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x turned; see `rope.rope_apply`. x may be a view with any strides but the last."""
    x, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, cos, sin))
    tokens, heads, size = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = cos.shape[-1] // 2
    tile = min(_HEADS, triton.next_power_of_2(heads))
    if y.numel():
        _rope[(tokens, triton.cdiv(heads, tile))](
            x, cos, sin, y, heads, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
            **_constants(half, size - 2 * half, tile), INVERSE=inverse, num_warps=_warps(tile, half),
        )  # fmt: skip
    return y


def _constants(half: int, rest: int, heads: int) -> dict[str, int]:
    sizes = {"HALF": half, "REST": rest, "HEADS": heads}
    return sizes | {"BLOCK": triton.next_power_of_2(half), "REST_BLOCK": triton.next_power_of_2(max(rest, 1))}


def _warps(heads: int, half: int) -> int:
    """Eight numbers of each half, one wide load, for every thread."""
    return max(1, min(4, heads * half // 256))


def static_cases() -> list[StaticCase]:
    """Llama-3-8B's queries, forward, and Phi-3-small's partly turned heads, backward."""
    types = "*bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32 i32"
    lora_types = "*bf16 *bf16 *bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32 i32 i32 i32 i32 fp32"
    whole, partial = _constants(64, 0, 32), _constants(32, 64, 32)
    return [
        static_case("rope 32x128", _rope, types, whole | {"INVERSE": False}, num_warps=_warps(32, 64)),
        static_case("rope 32x128 partial", _rope, types, partial | {"INVERSE": True}, num_warps=_warps(32, 32)),
        *(
            static_case(
                f"rope 128 lora {rank}", _rope_lora, lora_types, {"INVERSE": False} | _lora_constants(64, rank),
                num_warps=_LORA_WARPS,
            )
            for rank in (16, 64)
        ),
    ]  # fmt: skip
