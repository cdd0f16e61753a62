"""Rotary position embedding (arXiv 2104.09864), Hugging Face's convention: the two halves of a head are the pairs.

Nothing but cos and sin is saved: the backward pass is the rotation by the opposite angle.

On a GPU the Triton kernel of `rope_triton.py` runs, under `torch.compile` as a custom op; on a CPU there is plain
PyTorch only, which the compiler fuses with its surroundings.

Shapes: x [T, H, D]; cos, sin [T, R], R <= D even: the first R numbers of a head are turned (partial rotary), the rest
passes through. The two halves of cos, and of sin, are equal, as every `rotary_emb` of transformers makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamahome.kernels.launch import use_triton
from llamahome.kernels.low_rank import LowRank, add_low_rank


def rotate_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The plain definition, differentiable; same arguments and result as `rotate`."""
    return _turn(q, cos, sin), _turn(k, cos, sin)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] and k [T, Hk, D] turned by their tokens' angles; differentiable once, not by the angles."""
    if _as_op(q):
        return _op(q, cos, sin, False), _op(k, cos, sin, False)
    turned_q, turned_k = _Rope.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return turned_q, turned_k


def rope_apply(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, update: LowRank | None = None) -> Tensor:
    """x turned, or turned back (the transposed map, which is the gradient's), without autograd; in x's dtype.

    update: a rank-r part of x, as [T, H * D], that it lacks yet. The gradient of x turned back is the update's too.
    """
    if update is not None:
        if cos.shape[-1] == x.shape[-1] and _as_op(x):
            whole: Tensor = _lora_op(x, cos, sin, inverse, *update)
            return whole
        if cos.shape[-1] == x.shape[-1] and _runs_triton(x):
            from llamahome.kernels.rope_triton import apply_with_update

            absorbed: Tensor = apply_with_update(x, cos, sin, inverse, update)
            return absorbed
        x = add_low_rank(x.flatten(1), update).view(x.shape)
    if _as_op(x):
        turned: Tensor = _op(x, cos, sin, inverse)
        return turned
    if _runs_triton(x):
        from llamahome.kernels.rope_triton import apply

        result: Tensor = apply(x, cos, sin, inverse)
        return result
    return _turn(x, cos, -sin if inverse else sin)


@torch.library.custom_op("llamahome::rope", mutates_args=())
def _op(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return rope_apply(x, cos, sin, inverse)


@_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return rope_apply(grad, cos, sin, not ctx.inverse), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("llamahome::rope_lora", mutates_args=())
def _lora_op(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, xa: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Without autograd: whoever absorbs an adapter knows its whole backward pass."""
    return rope_apply(x, cos, sin, inverse, LowRank(xa, b, scaling))


@_lora_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, xa: Tensor, b: Tensor, scaling: float) -> Tensor:
    return x.new_empty(x.shape)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rope_apply(q, cos, sin), rope_apply(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rope_apply(dq, cos, sin, inverse=True), rope_apply(dk, cos, sin, inverse=True), None, None


def _as_op(x: Tensor) -> bool:
    """A compiler sees custom ops where Triton kernels run, and plain PyTorch elsewhere."""
    return torch.compiler.is_compiling() and _runs_triton(x)


def _runs_triton(x: Tensor) -> bool:
    return use_triton(x) and x.dtype != torch.float64


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    head = x[..., :turned]
    first, second = head.chunk(2, -1)
    head = (head * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return head if turned == x.shape[-1] else torch.cat((head, x[..., turned:]), -1)
