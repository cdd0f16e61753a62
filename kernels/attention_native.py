"""Attention of packed samples in bf16 on processors with AVX512-BF16, by the C++ code of `csrc/attention.cpp`.

ATen's flash kernels multiply in fp32 or by calls to the matrix library that are too small for it: three to six times
the time. A sample and key head is one thread's work, and its sums have a fixed order: the same bits for any number of
threads, and whatever else is packed beside.

Shapes: T tokens, Hq query heads, Hk key and value heads, D head size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamahome import _C

_HAS_BF16 = _C.has_bf16_attention()
_GAIN = 3  # by which one thread is faster here at least; ATen splits a sample over threads as well


def fits_native(q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float, window: int) -> bool:
    """Whether q [T, Hq, D] and k [T, Hk, D] are computed here: where it can be, with enough work for the threads."""
    if not (_HAS_BF16 and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] % 16 == 0 and scale > 0):
        return False
    lengths = cu_seqlens.diff()
    if window and bool((lengths > window).any()):
        return False
    return len(lengths) * k.shape[1] * _GAIN >= torch.get_num_threads()


def native_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D], zeros past the last boundary, and the natural log-sum-exp [Hq, T] in fp32."""
    out = _new(q, cu_seqlens)
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)
    edges, threads = _edges(cu_seqlens), torch.get_num_threads()
    _C.attention_forward(_bits(q), _bits(k), _bits(v), edges, scale, threads, _bits(out), lse.numpy())
    return out, lse


def native_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes of q, k, v; `out` and `lse` as `native_forward` gave them."""
    dq, dk, dv = (_new(x, cu_seqlens) for x in (q, k, v))
    _C.attention_backward(
        _bits(grad), _bits(q), _bits(k), _bits(v), _bits(out), lse.contiguous().numpy(), _edges(cu_seqlens), scale,
        torch.get_num_threads(), _bits(dq), _bits(dk), _bits(dv),
    )  # fmt: skip
    return dq, dk, dv


def _new(like: Tensor, cu_seqlens: Tensor) -> Tensor:
    made = torch.empty_like(like, memory_format=torch.contiguous_format)
    made[int(cu_seqlens[-1]) :].zero_()
    return made


def _bits(x: Tensor) -> NDArray[np.uint16]:
    """The numbers of a bf16 tensor as numpy's uint16; shared with it where it is contiguous."""
    bits: NDArray[np.uint16] = x.detach().contiguous().view(torch.uint16).numpy()
    return bits


def _edges(cu_seqlens: Tensor) -> NDArray[np.int32]:
    edges: NDArray[np.int32] = cu_seqlens.to(torch.int32).contiguous().numpy()
    return edges
