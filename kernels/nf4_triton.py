"""Triton kernels of 4-bit weights: the dense weight, and a tile of it for the product that never makes it whole.

A code is looked up in a table of 16 words, which are 16 banks of the first-level cache: no lane waits for another.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import table_cases
from llamahome.kernels.launch import LaunchConfig, StaticCase, aligned, config_for
from llamahome.kernels.nf4 import NESTED_BLOCK, NestedAbsmax, Nf4Weight

_ROW = "nf4_dequantize", "bytes"  # of the launch table


@triton.jit
def nf4_tile(  # noqa: ANN201
    packed_ptr, absmax_ptr, code_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, column, start, columns, depth,
    dtype: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Numbers [column, start .. start + DEPTH] of a weight, rounded to dtype as `dequantize` rounds them.

    A row of the weight is `depth` numbers, a multiple of DEPTH, and DEPTH divides BLOCK: a row's part has one scale.
    """
    known = column < columns
    byte = tl.arange(0, DEPTH // 2) + start // 2
    packed = tl.load(packed_ptr + column[:, None] * (depth // 2) + byte[None, :], mask=known[:, None], other=0)
    block = (column * depth + start) // BLOCK
    if NESTED:
        quantized = tl.load(absmax_ptr + block, mask=known, other=0).to(tl.int32)
        own = tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=known, other=0.0)
        scale = tl.load(nested_code_ptr + quantized) * own + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=known, other=0.0)
    packed = packed.to(tl.int32)
    pair = tl.join(tl.load(code_ptr + (packed >> 4)), tl.load(code_ptr + (packed & 15)))
    return (tl.reshape(pair, (column.shape[0], DEPTH)) * scale[:, None]).to(dtype)


def tile_operands(weight: Nf4Weight) -> tuple[Tensor | None, ...]:
    """The pointers of `nf4_tile`."""
    packed, code = aligned(weight.packed.flatten()), weight.code
    if isinstance(weight.absmax, NestedAbsmax):
        quantized, nested_code, absmax, offset = weight.absmax
        return packed, quantized, code, nested_code, absmax, offset
    return packed, weight.absmax, code, None, None, None


def tile_constants(weight: Nf4Weight) -> dict[str, int]:
    nested = isinstance(weight.absmax, NestedAbsmax)
    return {"BLOCK": weight.block, "NESTED": nested, "NESTED_BLOCK": NESTED_BLOCK}


@triton.jit
def _dequantize(
    packed_ptr, absmax_ptr, code_ptr, y_ptr, bytes_, count, BLOCK: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    number = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    packed = tl.load(packed_ptr + byte, mask=byte < bytes_, other=0).to(tl.int32)
    scale = tl.load(absmax_ptr + byte // (BLOCK // 2), mask=byte < bytes_, other=0.0)
    first = tl.load(code_ptr + (packed >> 4)) * scale
    second = tl.load(code_ptr + (packed & 15)) * scale
    pair = tl.join(first, second).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + number, tl.reshape(pair, (2 * BYTES,)), mask=number < count)


def dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: tuple[int, int], block: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight; see `nf4.dequantize`."""
    y = packed.new_empty(shape, dtype=dtype)
    count = math.prod(shape)
    if count:
        constants = _constants(config_for(*_ROW, packed))
        with torch.cuda.device_of(packed):
            _dequantize[(triton.cdiv(count, 2 * constants["BYTES"]),)](
                aligned(packed.flatten()), absmax, code, y, packed.numel(), count, BLOCK=block, **constants
            )
    return y


def _constants(config: LaunchConfig) -> dict[str, int]:
    return {"BYTES": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages}


def static_cases() -> list[StaticCase]:
    types = "*u8 *fp32 *fp32 *bf16 i32 i32"
    cases: list[StaticCase] = table_cases(
        "nf4 dequantize", _dequantize, types, _ROW, lambda config: {"BLOCK": 64} | _constants(config)
    )
    return cases
