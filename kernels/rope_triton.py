"""Triton kernel of the rotary embedding: a program turns one token's heads, whose cos and sin it loads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import static_case
from llamahome.kernels.launch import StaticCase

_HEADS = 32  # at most, per program


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
    whole, partial = _constants(64, 0, 32), _constants(32, 64, 32)
    return [
        static_case("rope 32x128", _rope, types, whole | {"INVERSE": False}, num_warps=_warps(32, 64)),
        static_case("rope 32x128 partial", _rope, types, partial | {"INVERSE": True}, num_warps=_warps(32, 32)),
    ]
