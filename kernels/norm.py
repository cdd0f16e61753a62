"""RMS norm (arXiv 1910.07467), alone or with the residual addition before it.

Saved for backward: the input and one fp32 number per row; the normalised rows are made again where they are needed.
Rounding is Hugging Face's: without offset (Llama) the normalised row is rounded to x's dtype, then scaled; with an
offset of 1 (Gemma) the row is scaled by offset + weight in fp32 and rounded once.

On a GPU the Triton kernels of `norm_triton.py` run, under `torch.compile` as custom ops. On a CPU there is plain
PyTorch only, which the compiler fuses with its surroundings. Eager mode takes the `autograd.Function`, which costs
less per call than an op.

Shapes: x [..., h], weight [h], rstd [...]; rstd is fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamahome.kernels.launch import use_triton
from llamahome.kernels.low_rank import LowRank, add_low_rank


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The plain definition, differentiable; same arguments and result as `rms_norm`."""
    rstd = torch.rsqrt(x.to(_wide(x)).square().mean(-1) + eps)
    return _scale(x, weight, rstd, offset)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The plain definition, differentiable; same arguments and result as `add_rms_norm`."""
    summed = x + residual
    return rms_norm_reference(summed, weight, eps, offset), summed


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), along the last dimension; differentiable once."""
    if _as_op(x):
        y: Tensor = _forward_op(x, weight, eps, offset)[0]
    else:
        y = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual); differentiable once."""
    if _as_op(x):
        y, summed, _ = _add_forward_op(x, residual, weight, eps, offset)
    else:
        y, summed = _AddRmsNorm.apply(x, residual, weight, eps, offset)  # type: ignore[no-untyped-call]
    return y, summed


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None,
    update: LowRank | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(y, rstd, x + residual or None) without autograd. `rstd` belongs to the sum where there is one.

    update: a rank-r part of x [T, h] that x lacks yet; only with a residual.
    """
    if update is not None:
        assert residual is not None
        if _as_op(x):
            y, summed, rstd = _add_lora_forward_op(x, residual, weight, eps, offset, *update)
            return y, rstd, summed
        if _runs_triton(x):
            from llamahome.kernels.norm_lora_triton import forward as absorbing

            results: tuple[Tensor, Tensor, Tensor] = absorbing(x, residual, weight, eps, offset, update)
            return results
        x = add_low_rank(x, update)
    if _as_op(x):
        if residual is None:
            return *_forward_op(x, weight, eps, offset), None
        y, summed, rstd = _add_forward_op(x, residual, weight, eps, offset)
        return y, rstd, summed
    if _runs_triton(x):
        from llamahome.kernels.norm_triton import forward

        outputs: tuple[Tensor, Tensor, Tensor | None] = forward(x, weight, eps, offset, residual)
        return outputs
    base = x if residual is None else x + residual
    rstd = torch.rsqrt(base.to(_wide(x)).square().mean(-1) + eps)
    return _scale(base, weight, rstd, offset), rstd, None if residual is None else base


def rms_norm_apply(x: Tensor, weight: Tensor, rstd: Tensor, offset: float = 0.0) -> Tensor:
    """The output of the norm again, from its input (the sum, if there was a residual) and `rstd`."""
    if _as_op(x):
        y: Tensor = _apply_op(x, weight, rstd, offset)
        return y
    if _runs_triton(x):
        from llamahome.kernels.norm_triton import apply

        again: Tensor = apply(x, weight, rstd, offset)
        return again
    return _scale(x, weight, rstd, offset)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float = 0.0,
    need_weight: bool = False, d_residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dx, d_weight or None) without autograd.

    `x` is the input of the norm (the sum, if there was a residual) and `d_residual` the gradient that reaches this
    sum by its other uses; dx includes it. All of it in fp32, rounded once.
    """
    if _as_op(x):
        dx, d_weight = _backward_op(dy, x, weight, rstd, offset, need_weight, d_residual)
        return dx, d_weight if need_weight else None
    if _runs_triton(x):
        from llamahome.kernels.norm_triton import backward

        grads: tuple[Tensor, Tensor | None] = backward(dy, x, weight, rstd, offset, need_weight, d_residual)
        return grads
    return _plain_backward(dy, x, weight, rstd, offset, need_weight, d_residual)


def _plain_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, need_weight: bool, d_residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    hat = x.to(rstd.dtype) * rstd[..., None]
    grad = dy.to(rstd.dtype)
    scaled = grad * (offset + weight.to(rstd.dtype))
    dx = rstd[..., None] * (scaled - hat * (scaled * hat).mean(-1, keepdim=True))
    if d_residual is not None:
        dx = dx + d_residual.to(rstd.dtype)
    d_weight = None
    if need_weight:
        used = hat if offset else hat.to(x.dtype).to(rstd.dtype)
        d_weight = (grad * used).flatten(0, -2).sum(0).to(weight.dtype)
    return dx.to(x.dtype), d_weight


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        output = rms_norm_forward(x, weight, eps, offset)
        _keep(ctx, (x, weight, eps, offset), output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, None)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor | None]:
        y, rstd, summed = rms_norm_forward(x, weight, eps, offset, residual)
        _keep_added(ctx, (x, residual, weight, eps, offset), (y, summed, rstd))
        return y, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_summed: Tensor) -> tuple[Tensor | None, ...]:
        return _added_gradients(ctx, dy, d_summed, None)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx: Any, dy: Tensor, _d_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    return *rms_norm_backward(dy, x, weight, rstd, ctx.offset, ctx.needs_input_grad[1]), None, None


def _keep_added(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, weight, _, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight, output[2])


def _added_gradients(ctx: Any, dy: Tensor, d_summed: Tensor, _d_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    summed, weight, rstd = ctx.saved_tensors
    dx, d_weight = rms_norm_backward(dy, summed, weight, rstd, ctx.offset, ctx.needs_input_grad[2], d_summed)
    return dx, dx, d_weight, None, None


@torch.library.custom_op("llamahome::rms_norm", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, rstd, _ = rms_norm_forward(x, weight, eps, offset)
    return y, rstd


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return empty_output(x, weight, offset), x.new_empty(x.shape[:-1], dtype=_wide(x))


@torch.library.custom_op("llamahome::add_rms_norm", mutates_args=())
def _add_forward_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd, summed = rms_norm_forward(x, weight, eps, offset, residual)
    assert summed is not None
    return y, summed, rstd


@_add_forward_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return empty_output(summed, weight, offset), summed, x.new_empty(x.shape[:-1], dtype=_wide(x))


@torch.library.custom_op("llamahome::add_rms_norm_lora", mutates_args=())
def _add_lora_forward_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, xa: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Without autograd: whoever absorbs an adapter knows its whole backward pass."""
    y, rstd, summed = rms_norm_forward(x, weight, eps, offset, residual, LowRank(xa, b, scaling))
    assert summed is not None
    return y, summed, rstd


@_add_lora_forward_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, xa: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return empty_output(summed, weight, offset), summed, x.new_empty(x.shape[:-1], dtype=_wide(x))


@torch.library.custom_op("llamahome::rms_norm_apply", mutates_args=())
def _apply_op(x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    return rms_norm_apply(x, weight, rstd, offset)


@_apply_op.register_fake
def _(x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    return empty_output(x, weight, offset)


@torch.library.custom_op("llamahome::rms_norm_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, need_weight: bool, d_residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """An empty d_weight where none is needed: an operator has no optional results."""
    dx, d_weight = rms_norm_backward(dy, x, weight, rstd, offset, need_weight, d_residual)
    return dx, weight.new_empty(0) if d_weight is None else d_weight


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, need_weight: bool, d_residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if need_weight else (0,))


_forward_op.register_autograd(_gradients, setup_context=_keep)
_add_forward_op.register_autograd(_added_gradients, setup_context=_keep_added)


def empty_output(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    """y's: x's dtype where the weight is applied before rounding, else that of the product of the two."""
    return x.new_empty(x.shape, dtype=x.dtype if offset else torch.promote_types(x.dtype, weight.dtype))


def _scale(x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    hat = x.to(rstd.dtype) * rstd[..., None]
    if offset:
        return (hat * (offset + weight.to(rstd.dtype))).to(x.dtype)
    return weight * hat.to(x.dtype)


def _as_op(x: Tensor) -> bool:
    """A compiler sees custom ops where Triton kernels run, and plain PyTorch elsewhere."""
    return torch.compiler.is_compiling() and _runs_triton(x)


def _runs_triton(x: Tensor) -> bool:
    return use_triton(x) and x.dtype != torch.float64


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
