"""RMS norm (arXiv 1910.07467), alone or with the residual addition before it.

Saved for backward: the input and one fp32 number per row; the normalised rows are made again where they are needed.
Rounding is Hugging Face's: without offset (Llama) the normalised row is rounded to x's dtype, then scaled; with an
offset of 1 (Gemma) the row is scaled by offset + weight in fp32 and rounded once.

Shapes: x [..., h], weight [h], rstd [...]; rstd is fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    y: Tensor = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual); differentiable once."""
    y, summed = _AddRmsNorm.apply(x, residual, weight, eps, offset)  # type: ignore[no-untyped-call]
    return y, summed


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, rstd, x + residual or None) without autograd. `rstd` belongs to the sum where there is one."""
    summed = None if residual is None else x + residual
    base = x if summed is None else summed
    rstd = torch.rsqrt(base.to(_wide(x)).square().mean(-1) + eps)
    return _scale(base, weight, rstd, offset), rstd, summed


def rms_norm_apply(x: Tensor, weight: Tensor, rstd: Tensor, offset: float = 0.0) -> Tensor:
    """The output of the norm again, from its input (the sum, if there was a residual) and `rstd`."""
    return _scale(x, weight, rstd, offset)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float = 0.0,
    need_weight: bool = False, d_residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dx, d_weight or None) without autograd.

    `x` is the input of the norm (the sum, if there was a residual) and `d_residual` the gradient that reaches this
    sum by its other uses; dx includes it. All of it in fp32, rounded once.
    """
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
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:  # type: ignore[no-untyped-def] # noqa: ANN001
        y, rstd, _ = rms_norm_forward(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        x, weight, rstd = ctx.saved_tensors
        dx, d_weight = rms_norm_backward(dy, x, weight, rstd, ctx.offset, ctx.needs_input_grad[1])
        return dx, d_weight, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float,  # noqa: ANN001
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        y, rstd, summed = rms_norm_forward(x, weight, eps, offset, residual)
        ctx.save_for_backward(summed, weight, rstd)
        ctx.offset = offset
        return y, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, d_summed: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        summed, weight, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[2]
        dx, d_weight = rms_norm_backward(dy, summed, weight, rstd, ctx.offset, needed, d_summed)
        return dx, dx, d_weight, None, None


def _scale(x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    hat = x.to(rstd.dtype) * rstd[..., None]
    if offset:
        return (hat * (offset + weight.to(rstd.dtype))).to(x.dtype)
    return weight * hat.to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
