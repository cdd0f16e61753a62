"""Triton kernel of the cross-entropy over one chunk of logits, whose gradient takes the logits' place.

A program holds a row's columns a tile at a time and goes over them twice: once for the sums, once for the gradient.
The label stands apart from the others: with L = log sum over the others of exp(x - x_label), the loss is
softplus(L) and its gradient at the label expm1(-loss). Neither collapses to zero when the label is all but certain,
as log-sum-exp minus x_label and p - 1 do in fp32 beyond a gap of 17.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamahome.kernels.cases import table_cases
from llamahome.kernels.launch import LaunchConfig, StaticCase, config_for

_ROW = "cross_entropy", "columns"  # of the launch table
_FAR = -1e30  # below any logit; minus infinity would make differences that are not numbers


@triton.jit
def _cross_entropy(
    z_ptr, label_ptr, loss_ptr, factor_ptr, size, z_stride, scale, softcap, smoothing, z_loss,
    IGNORE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr,
    FACTOR: tl.constexpr, FAR: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    label = tl.load(label_ptr + row)
    counted = label != IGNORE
    known = (label >= 0) & (label < size)
    at = tl.where(known, label, 0)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    smoothing = tl.cast(smoothing, tl.float32)
    z_loss = tl.cast(z_loss, tl.float32)

    picked, _at_label = _bend(tl.load(z_ptr + at).to(tl.float32), scale, softcap, SOFTCAP)
    top = tl.full((COLUMNS,), FAR, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    plain = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = tl.load(z_ptr + column, mask=column < size, other=0.0).to(tl.float32)
        x, _slope = _bend(z, scale, softcap, SOFTCAP)
        if SMOOTHING:
            plain += tl.where(column < size, x, 0.0)
        x = tl.where((column < size) & (column != at), x, FAR)
        less = tl.exp(-tl.abs(x - top))  # one exponential serves both cases
        total = tl.where(x > top, total * less + 1.0, total + less)
        top = tl.maximum(top, x)
    peak = tl.max(top, 0)
    others = peak + tl.log(tl.maximum(tl.sum(tl.where(top > FAR, total * tl.exp(top - peak), 0.0), 0), 1.0))
    gap = others - picked
    small = tl.exp(-tl.abs(gap))
    nll = tl.maximum(gap, 0.0) + _log1p(small)
    lse = picked + nll
    loss = nll + z_loss * lse * lse
    if SMOOTHING:
        loss += smoothing * (picked - tl.sum(plain, 0) / size)
    tl.store(loss_ptr + row, tl.where(counted, tl.where(known, loss, float("nan")), 0.0))

    if GRADIENT:
        # d nll / d picked = -p(others) = expm1(-nll), without the cancellation of p(label) - 1.
        absent = tl.where(gap > 0, 1.0, small) / (1.0 + small)
        growth = 1.0 + 2.0 * z_loss * lse
        spread = smoothing / size
        factor = tl.load(factor_ptr).to(tl.float32) if FACTOR else 1.0
        for start in range(0, size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            z = tl.load(z_ptr + column, mask=column < size, other=0.0).to(tl.float32)
            x, slope = _bend(z, scale, softcap, SOFTCAP)
            grad = tl.exp(x - lse) * growth - spread
            own = smoothing - absent + 2.0 * z_loss * lse * (1.0 - absent) - spread
            grad = tl.where(column == at, own, grad) * slope
            grad = tl.where(counted, grad * factor, 0.0)
            tl.store(z_ptr + column, grad.to(z_ptr.dtype.element_ty), mask=column < size)


@triton.jit
def _bend(z, scale, softcap, SOFTCAP: tl.constexpr):
    """The logit and its derivative by z."""
    x = z * scale
    if SOFTCAP:
        half = tl.sigmoid(2.0 * x / softcap)
        x = softcap * (2.0 * half - 1.0)
        slope = 4.0 * half * (1.0 - half) * scale
    else:
        slope = scale
    return x, slope


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1 by its series in x / (2 + x); `tl.log` near 1 loses the small ones."""
    w = x / (2.0 + x)
    s = w * w
    series = 1.0 / 15.0
    series = series * s + 1.0 / 13.0
    series = series * s + 1.0 / 11.0
    series = series * s + 1.0 / 9.0
    series = series * s + 1.0 / 7.0
    series = series * s + 1.0 / 5.0
    series = series * s + 1.0 / 3.0
    return 2.0 * w * (1.0 + s * series)


def cross_entropy(
    z: Tensor, labels: Tensor, factor: Tensor | None, logit_scale: float, softcap: float, label_smoothing: float,
    z_loss: float, ignore_index: int, gradient: bool,
) -> Tensor:  # fmt: skip
    """The losses fp32 [rows] of z [rows, V], 0 for ignored rows; with `gradient` d loss / d z takes z's place.

    `factor`, one number on the device or None, multiplies the gradient before it is rounded, not the losses.

    A label that is neither ignored nor a column gives a loss that is not a number.
    """
    rows, size = z.shape
    loss = torch.empty(rows, dtype=torch.float32, device=z.device)
    if rows:
        with torch.cuda.device_of(z):
            _cross_entropy[(rows,)](
                z, labels.contiguous(), loss, factor, size, z.stride(0), logit_scale, softcap, label_smoothing, z_loss,
                IGNORE=ignore_index, SOFTCAP=softcap != 0, SMOOTHING=label_smoothing != 0, GRADIENT=gradient,
                FACTOR=factor is not None, **_constants(config_for(*_ROW, z), size),
            )  # fmt: skip
    return loss


def _constants(config: LaunchConfig, size: int) -> dict[str, int | float]:
    columns = min(config.block_n, triton.next_power_of_2(size))
    warps = max(1, min(config.num_warps, columns // 512))
    return {"FAR": _FAR, "COLUMNS": columns, "num_warps": warps, "num_stages": config.num_stages}


def static_cases() -> list[StaticCase]:
    """Llama 3's vocabulary, plainly; Gemma's, with everything on."""
    types = "*bf16 *i64 *fp32 {} i32 i32 fp32 fp32 fp32 fp32"
    plain = {"IGNORE": -100, "SOFTCAP": False, "SMOOTHING": False, "GRADIENT": True, "FACTOR": False}
    full = plain | {"SOFTCAP": True, "SMOOTHING": True, "FACTOR": True}
    return [
        *table_cases("cross_entropy", _cross_entropy, types.format("-"), _ROW, lambda c: plain | _constants(c, 128256)),
        *table_cases(
            "cross_entropy full", _cross_entropy, types.format("*fp32"), _ROW, lambda c: full | _constants(c, 128256)
        ),
    ]
