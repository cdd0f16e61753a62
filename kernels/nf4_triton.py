"""Triton kernels of 4-bit weights: the dense weight, and a small product that never makes it.

A code is looked up in a table of 16 words, which are 16 banks of the first-level cache: no lane waits for another.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import static_case
from llamahome.kernels.launch import StaticCase, aligned

_BYTES = 4096  # of one program: a wide load or two for each of 128 threads, one for each of AMD's 256


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
        _dequantize[(triton.cdiv(count, 2 * _BYTES),)](
            aligned(packed.flatten()), absmax, code, y, packed.numel(), count, BLOCK=block, BYTES=_BYTES, num_warps=4
        )
    return y


def static_cases() -> list[StaticCase]:
    return [
        static_case(
            "nf4 dequantize", _dequantize, "*u8 *fp32 *fp32 *bf16 i32 i32", {"BLOCK": 64, "BYTES": _BYTES}, num_warps=4
        )
    ]
