"""Weights in 4 bits (NF4 of QLoRA, arXiv 2305.14314), laid out as bitsandbytes keeps them, and their way back.

A weight [N, K] is a row of blocks of 64 numbers. Each number is one of 16 codes between -1 and 1, two to a byte, the
first in the high half; each block has the largest absolute value of its numbers in fp32, or, with double quantization,
in 8 bits again. Nothing here trains them: they are frozen, and `lora.py` makes a dense weight of one projection at a
time, in the forward pass and once more in the backward pass, and keeps none.

On a GPU the Triton kernels of `nf4_triton.py` run, under `torch.compile` as a custom op; on a CPU bitsandbytes' own
operator where it is loaded, with the same bits (it is seven times as fast), and plain PyTorch elsewhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamahome.kernels.launch import use_triton

BLOCK = 64  # numbers under one largest value: bitsandbytes' and QLoRA's default
NESTED_BLOCK = 256  # largest values under one of their own, where they are quantized again
_PART = 1 << 20  # numbers made at once on a CPU, which bounds what is in memory besides the result

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NestedAbsmax(NamedTuple):
    """The blocks' largest values, quantized again: code[quantized[i]] * absmax[i // 256] + offset."""

    quantized: Tensor  # uint8 [blocks]
    code: Tensor  # fp32 [256]
    absmax: Tensor  # fp32 [ceil(blocks / 256)]
    offset: Tensor  # fp32, one number


class Nf4Weight(NamedTuple):
    """A frozen weight [N, K] in 4 bits. `LoraWeights.weight` may be one: its projections then train adapters alone."""

    packed: Tensor  # uint8, ceil(N * K / 2) of them in any shape
    absmax: Tensor | NestedAbsmax  # fp32 [blocks]
    shape: tuple[int, int]
    dtype: torch.dtype  # what the weight was, and what its model computes in
    code: Tensor  # fp32 [16], NF4_CODE on the weight's device
    block: int = BLOCK


def from_bitsandbytes(parameter: Any) -> Nf4Weight:
    """The weight of a `bitsandbytes.nn.Linear4bit` that has been quantized (moved to its device), sharing its memory.

    Raises: ValueError where it is not quantized yet, not in NF4, or its largest values are in blocks other than 256.
    """
    state = parameter.quant_state
    if state is None:
        raise ValueError("the weight is not quantized yet: move its module to its device first")
    if state.quant_type != "nf4":
        raise ValueError(f"the weight is in {state.quant_type!r}, not in 'nf4'")
    absmax = state.absmax
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCK:
            raise ValueError(f"largest values quantized in blocks of {state.state2.blocksize}, not of {NESTED_BLOCK}")
        absmax = NestedAbsmax(absmax, state.state2.code, state.state2.absmax, state.offset)
    return Nf4Weight(parameter.data, absmax, tuple(state.shape), state.dtype, state.code, state.blocksize)


def quantize(weight: Tensor, block: int = BLOCK) -> Nf4Weight:
    """weight [N, K] to the nearest codes, largest values in fp32; for tests and benchmarks, slow and plain."""
    count = weight.numel()
    blocks = torch.nn.functional.pad(weight.float().flatten(), (0, -count % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    code = torch.tensor(NF4_CODE, device=weight.device)
    numbers = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(numbers, (code[1:] + code[:-1]) / 2).to(torch.uint8).flatten()[: count + count % 2]
    rows, columns = weight.shape
    return Nf4Weight(nearest[::2] << 4 | nearest[1::2], absmax, (rows, columns), weight.dtype, code, block)


def absmax_of(weight: Nf4Weight) -> Tensor:
    """The blocks' largest values, fp32 [blocks]."""
    if isinstance(weight.absmax, Tensor):
        return weight.absmax
    quantized, code, absmax, offset = weight.absmax
    own = absmax.repeat_interleave(NESTED_BLOCK)[: quantized.numel()]
    return code[quantized.flatten().long()] * own + offset


def dequantize(weight: Nf4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight [N, K], each number computed in fp32 and rounded once to `dtype` (the weight's own if None)."""
    dtype = dtype or weight.dtype
    if use_triton(weight.packed):
        absmax = absmax_of(weight)
        if torch.compiler.is_compiling():
            op: Tensor = _dequantize_op(weight.packed, absmax, weight.code, *weight.shape, weight.block, dtype)
            return op
        from llamahome.kernels.nf4_triton import dequantize as launch

        dense: Tensor = launch(weight.packed, absmax, weight.code, weight.shape, weight.block, dtype)
        return dense
    return _by_library(weight, dtype) if _library_is_right(weight) else dequantize_reference(weight, dtype)


def _library_is_right(weight: Nf4Weight) -> bool:
    """bitsandbytes 0.50 on a CPU gives wrong numbers where a row of the weight ends within a block."""
    return weight.shape[1] % weight.block == 0 and hasattr(torch.ops.bitsandbytes, "dequantize_4bit")


def _by_library(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    low = torch.float32 if dtype == torch.float64 else dtype  # of the types that it knows
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed, absmax_of(weight), weight.block, "nf4", weight.shape, low
    )
    return dense.to(dtype)


def dequantize_reference(weight: Nf4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The plain definition; same arguments and result as `dequantize`."""
    count = math.prod(weight.shape)
    packed, absmax = weight.packed.flatten(), absmax_of(weight)
    dense = packed.new_empty(count, dtype=dtype or weight.dtype)
    pairs = torch.cartesian_prod(weight.code, weight.code)  # [256, 2]: both numbers of a byte
    step = _PART // weight.block * weight.block
    for start in range(0, count, step):
        stop = min(count, start + step)
        numbers = pairs[packed[start // 2 : (stop + 1) // 2].int()].flatten()[: stop - start]
        scales = absmax[start // weight.block : -(-stop // weight.block)]
        if numbers.numel() % weight.block:
            dense[start:stop] = numbers * scales.repeat_interleave(weight.block)[: numbers.numel()]
        else:
            dense[start:stop] = (numbers.view(-1, weight.block) * scales[:, None]).flatten()
    return dense.view(weight.shape)


@torch.library.custom_op("llamahome::nf4_dequantize", mutates_args=())
def _dequantize_op(
    packed: Tensor, absmax: Tensor, code: Tensor, rows: int, columns: int, block: int, dtype: torch.dtype
) -> Tensor:
    return dequantize(Nf4Weight(packed, absmax, (rows, columns), dtype, code, block))


@_dequantize_op.register_fake
def _(packed: Tensor, absmax: Tensor, code: Tensor, rows: int, columns: int, block: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)
