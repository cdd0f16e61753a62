"""The rank-r part of a LoRA projection, handed to the operation that reads the frozen product anyway.

It adds scaling * xa @ b.T while the product is in registers: no pass of its own over it, and one rounding fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llamahome.kernels.launch import use_triton


class LowRank(NamedTuple):
    """scaling * xa @ b.T, without autograd: xa [T, r] is x @ a.T, b [N, r]."""

    xa: Tensor
    b: Tensor
    scaling: float


def absorbs(x: Tensor) -> bool:
    """Whether kernels run on x that add a rank-r part themselves."""
    return use_triton(x) and x.dtype != torch.float64


def add_low_rank(x: Tensor, update: LowRank | None) -> Tensor:
    """x [T, N] with the update, plainly."""
    return x if update is None else torch.addmm(x, update.xa, update.b.T, alpha=update.scaling)
