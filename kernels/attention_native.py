"""Attention of packed samples on processors with AVX-512 (fp32) or AVX512-BF16 (bf16), by `csrc/attention_tasks.h`.

ATen's flash kernels multiply in fp32 or by calls to the matrix library that are too small for it: three to six times
the time in bf16, two to five times in fp32. A sample and key head is one thread's work, and its sums have a fixed
order: the same bits for any number of threads, and whatever else is packed beside.

Shapes: T tokens, Hq query heads, Hk key and value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamahome import _C

_NATIVE = {torch.float32: _C.has_avx512(), torch.bfloat16: _C.has_avx512_bf16()}
_GAIN = 3  # by which one thread is about faster here (2.2 to 6); ATen splits a sample over threads as well


def fits_native(q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float, window: int) -> bool:
    """Whether q [T, Hq, D] and k [T, Hk, D] are computed here: where it can be, with enough work for the threads."""
    if not (_NATIVE.get(q.dtype) and q.device.type == "cpu" and q.shape[2] % 16 == 0 and scale > 0):
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
    _C.attention_forward(_numbers(q), _numbers(k), _numbers(v), edges, scale, threads, _numbers(out), lse.numpy())
    return out, lse


def native_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes of q, k, v; `out` and `lse` as `native_forward` gave them."""
    dq, dk, dv = (_new(x, cu_seqlens) for x in (q, k, v))
    threads = torch.get_num_threads()
    grad_, q_, k_, v_, out_, lse_, dq_, dk_, dv_ = map(_numbers, (grad, q, k, v, out, lse, dq, dk, dv))
    _C.attention_backward(
        grad_, q_, k_, v_, out_, lse_, _edges(cu_seqlens), scale, threads, d_query=dq_, d_key=dk_, d_value=dv_
    )
    return dq, dk, dv


def _new(like: Tensor, cu_seqlens: Tensor) -> Tensor:
    made = torch.empty_like(like, memory_format=torch.contiguous_format)
    made[int(cu_seqlens[-1]) :].zero_()
    return made


def _numbers(x: Tensor) -> NDArray[Any]:
    """A tensor as numpy sees it, bf16 as uint16; shared with it where it is contiguous."""
    x = x.detach().contiguous()
    numbers: NDArray[Any] = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return numbers


def _edges(cu_seqlens: Tensor) -> NDArray[np.int32]:
    edges: NDArray[np.int32] = cu_seqlens.to(torch.int32).contiguous().numpy()
    return edges
