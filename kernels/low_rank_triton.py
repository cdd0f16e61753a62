"""The rank-r part of a tile, for the kernels that absorb it (see `low_rank.py`)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.launch import aligned
from llamahome.kernels.low_rank import LowRank

MIN_RANK = 16  # a tensor core's smallest inner dimension: lower ranks are padded by zeros


@triton.jit
def low_rank(xa_ptr, b_ptr, row, column, row_inside, column_inside, rank, xa_stride, scaling, RANK: tl.constexpr):  # noqa: ANN201
    """scaling * xa @ b.T of rows `row` and columns `column`, in fp32."""
    r = tl.arange(0, RANK)
    xa = tl.load(
        xa_ptr + tl.cast(row, tl.int64)[:, None] * xa_stride + r[None, :],
        mask=row_inside[:, None] & (r < rank)[None, :],
        other=0.0,
    )
    b = tl.load(
        b_ptr + tl.cast(column, tl.int64)[:, None] * rank + r[None, :],
        mask=column_inside[:, None] & (r < rank)[None, :],
        other=0.0,
    )
    return tl.dot(xa, b.to(xa.dtype).T, input_precision="ieee") * tl.cast(scaling, tl.float32)


def operands(update: LowRank) -> tuple[Tensor, Tensor, int, int, float]:
    """(xa, b, rank, xa's stride, scaling) as the kernels take them."""
    xa = aligned(update.xa)
    return xa, aligned(update.b.contiguous()), update.b.shape[1], xa.stride(0), update.scaling


def padded(rank: int) -> int:
    """The rank in the kernels' registers."""
    size: int = triton.next_power_of_2(rank)
    return max(MIN_RANK, size)
