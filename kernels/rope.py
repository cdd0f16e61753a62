"""Rotary position embedding (arXiv 2104.09864), Hugging Face's convention: the two halves of a head are the pairs.

Nothing but cos and sin is saved: the backward pass is the rotation by the opposite angle.

Shapes: x [T, H, D]; cos, sin [T, R], R <= D even: the first R numbers of a head are turned (partial rotary), the rest
passes through. The two halves of cos, and of sin, are equal, as every `rotary_emb` of transformers makes them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The plain definition, differentiable; same arguments and result as `rope`."""
    return _turn(q, cos, sin), _turn(k, cos, sin)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] and k [T, Hk, D] turned by their tokens' angles; differentiable once, not by the angles."""
    turned_q, turned_k = _Rope.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return turned_q, turned_k


def rope_apply(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x turned, or turned back (the transposed map, which is the gradient's), without autograd; in x's dtype."""
    return _turn(x, cos, -sin if inverse else sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def] # noqa: ANN001
        ctx.save_for_backward(cos, sin)
        return rope_apply(q, cos, sin), rope_apply(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        cos, sin = ctx.saved_tensors
        return rope_apply(dq, cos, sin, inverse=True), rope_apply(dk, cos, sin, inverse=True), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    head = x[..., :turned]
    first, second = head.chunk(2, -1)
    head = (head * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return head if turned == x.shape[-1] else torch.cat((head, x[..., turned:]), -1)
