"""Output projection and cross-entropy in one pass, in chunks of rows: logits [tokens, vocabulary] never exist whole.

The gradient of the hidden states is made in the forward pass, while a chunk's logits are at hand, as in Liger's
fused linear cross-entropy (arXiv 2410.10989). It takes the logits' place, in the dtype of the product; between the
two a block of rows at a time is fp32. A frozen weight costs no gradient.

With gap = log sum over the other tokens of exp(logit - label's logit), the loss is softplus(gap) and its gradient at
the label expm1(-loss): right in relative terms for a label that is all but certain, where log-sum-exp minus logit and
p - 1 round to zero.

The mean's factor 1 / count is a mantissa, which scales the gradient while it is fp32, and a power of two, which is
applied to the rounded gradient without another rounding (and, in fp16, without an underflow).

Under `torch.compile` the whole is one custom op, on every device: its loop over chunks is no work for a compiler.

Shapes: N rows (tokens that are trained), h hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llamahome.kernels.launch import use_triton
from llamahome.kernels.loss_native import fits_native, native_cross_entropy
from llamahome.kernels.products import multiply

IGNORE_INDEX = -100
_ROWS = 64  # chunks are filled up to a multiple of it
_CHUNK_BYTES = 64 << 20  # of fp32 logits; beyond it larger chunks no longer speed the matrix product up
# Of fp32 logits that go from logits to gradient in a CPU's caches; each step waits for all threads.
_BLOCK_BYTES = 16 << 20
_SUM_BYTES = 2 << 20  # of a weight's gradient that is multiplied and added at a time, in a CPU's caches
_GPU_CHUNK_BYTES = 512 << 20  # of bf16 logits: the weight is read once per chunk, and should cost less than its product


class _Form(NamedTuple):
    """What is done to the logits, and what the loss adds to the plain cross-entropy."""

    logit_scale: float
    softcap: float
    label_smoothing: float
    z_loss: float


_PLAIN = _Form(1.0, 0.0, 0.0, 0.0)


class _Wants(NamedTuple):
    """Whose gradients are made."""

    hidden: bool
    weight: bool
    bias: bool


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """The plain definition with whole logits; same arguments and result as `linear_cross_entropy`."""
    logits = _logits(hidden, weight, bias, logit_scale, softcap)
    loss = F.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction=reduction
    )
    if z_loss:
        squares = logits[labels != IGNORE_INDEX].logsumexp(-1).square()
        loss = loss + z_loss * (squares.mean() if reduction == "mean" else squares.sum())
    return loss


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
    chunk_rows: int = 0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Cross-entropy of softmax(softcap(logit_scale * (hidden @ weight.T + bias))) against labels.

    Args:
        hidden: [N, h], floating; weight: [V, h]; bias: [V] or None.
        labels: int64 [N]; rows with -100 count for nothing. They must already be the next tokens.
        label_smoothing: share of the target that is spread over the vocabulary.
        reduction: "mean" over the rows that count, or "sum".
        chunk_rows: rows per chunk; 0 chooses by the vocabulary's size.
        z_loss: weight of the squared log-sum-exp of a row's logits, which keeps them from drifting (arXiv 2204.02311).

    Returns: a scalar, fp32 (fp64 for fp64 inputs). Under autocast the products run in autocast's dtype. A GPU is not
    waited for; there a label that is no row of `weight` gives a loss that is not a number.
    Raises: ValueError for another reduction; on a CPU RuntimeError for a label that is no row of `weight`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    rows = chunk_rows or chunk_rows_for(weight.shape[0], hidden.device.type)
    form = _Form(logit_scale, softcap, label_smoothing, z_loss)
    wants = _Wants(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)))
    function = _compiled if torch.compiler.is_compiling() else _eager
    if reduction == "sum":
        return function(hidden, weight, bias, labels, None, form, wants, rows, _compute_dtype(hidden))
    count = (labels != IGNORE_INDEX).sum()
    mantissa, exponent = torch.frexp(count.to(_accumulate_dtype(hidden)).reciprocal())
    total = function(hidden, weight, bias, labels, mantissa, form, wants, rows, _compute_dtype(hidden))
    return total * torch.ldexp(torch.ones_like(mantissa), exponent)


@torch.no_grad()
def token_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Summed loss (fp32 scalar) and number of rows whose most likely token is the label (int64 scalar)."""
    loss = torch.zeros((), dtype=_accumulate_dtype(hidden), device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    rows = chunk_rows_for(weight.shape[0])
    for h, y in zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True):
        logits = _logits(h, weight, bias, logit_scale, softcap)
        loss += F.cross_entropy(logits, y, reduction="sum")
        correct += (logits.argmax(-1) == y).sum()
    return loss, correct


def chunk_rows_for(vocabulary: int, device: str = "cpu") -> int:
    """Rows per chunk: fp32 logits near 64 MiB on a CPU, from 128 rows; bf16 ones near 512 MiB on a GPU, from 1,024."""
    if device == "cpu":
        return max(128, min(4096, _CHUNK_BYTES // (4 * vocabulary) // 64 * 64))
    return max(1024, min(4096, _GPU_CHUNK_BYTES // (2 * vocabulary) // 256 * 256))


def _eager(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: Tensor | None, form: _Form,
    wants: _Wants, rows: int, compute: torch.dtype,
) -> Tensor:  # fmt: skip
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, factor, form, wants, rows, compute
    )
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: Tensor | None,  # noqa: ANN001
        form: _Form, wants: _Wants, rows: int, compute: torch.dtype,
    ) -> Tensor:  # fmt: skip
        loss, *grads = _forward(hidden, weight, bias, labels, factor, form, wants, rows, compute)
        ctx.save_for_backward(*grads)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        return *_scaled(grad, ctx.saved_tensors, ctx.dtypes, in_place=True), *[None] * 6


def _compiled(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: Tensor | None, form: _Form,
    wants: _Wants, rows: int, compute: torch.dtype,
) -> Tensor:  # fmt: skip
    total: Tensor = _op(hidden, weight, bias, labels, factor, *form, *wants, rows, compute)[0]
    return total


@torch.library.custom_op("llamahome::linear_cross_entropy", mutates_args=())
def _op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: Tensor | None, logit_scale: float,
    softcap: float, label_smoothing: float, z_loss: float, want_hidden: bool, want_weight: bool, want_bias: bool,
    rows: int, compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`factor` by the summed loss, and the gradients; one that is not wanted is empty."""
    form = _Form(logit_scale, softcap, label_smoothing, z_loss)
    wants = _Wants(want_hidden, want_weight, want_bias)
    loss, *grads = _forward(hidden, weight, bias, labels, factor, form, wants, rows, compute)
    d_hidden, d_weight, d_bias = (loss.new_empty(0) if x is None else x for x in grads)
    return loss, d_hidden, d_weight, d_bias


@_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: Tensor | None, logit_scale: float,
    softcap: float, label_smoothing: float, z_loss: float, want_hidden: bool, want_weight: bool, want_bias: bool,
    rows: int, compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = _accumulate_dtype(hidden)
    loss = hidden.new_empty((), dtype=wide)
    d_hidden = torch.empty_like(hidden) if want_hidden else loss.new_empty(0)
    d_weight = torch.empty_like(weight, dtype=wide) if want_weight else loss.new_empty(0)
    d_bias = torch.empty_like(bias, dtype=wide) if want_bias and bias is not None else loss.new_empty(0)
    return loss, d_hidden, d_weight, d_bias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
    _, weight, bias, *_ = inputs
    ctx.wants = inputs[9:12]
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN002, ANN202
    grads = [x if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)]
    return *_scaled(grad, grads, ctx.dtypes, in_place=False), *[None] * 11


_op.register_autograd(_backward, setup_context=_setup_context)


def _scaled(
    grad: Tensor, saved: Sequence[Tensor | None], dtypes: tuple[torch.dtype, torch.dtype | None], *, in_place: bool
) -> tuple[Tensor | None, ...]:
    """The gradients by `grad`; `in_place` for the weight's, which would come twice while all activations are alive.

    Autograd then refuses a second backward pass through the same loss.
    """
    d_hidden, d_weight, d_bias = saved
    if d_weight is not None:
        d_weight = (d_weight.mul_(grad) if in_place else d_weight * grad).to(dtypes[0])
    return (
        None if d_hidden is None else d_hidden * grad,
        d_weight,
        None if d_bias is None else (d_bias * grad).to(dtypes[1]),
    )


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: Tensor | None, form: _Form,
    wants: _Wants, rows: int, compute: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`factor` by the summed loss, and the gradients of hidden (in its dtype), weight and bias (in fp32 or fp64)."""
    # The Triton kernel skips such rows itself: whether there are any is not asked of a GPU.
    keep = labels != IGNORE_INDEX
    if _runs_triton(hidden, compute) or bool(keep.all()):
        return _chunks(hidden, weight, bias, labels, factor, form, wants, rows, compute)
    loss, d_kept, d_weight, d_bias = _chunks(
        hidden[keep], weight, bias, labels[keep], factor, form, wants, rows, compute
    )
    d_hidden = None
    if d_kept is not None:
        d_hidden = torch.zeros_like(hidden)
        d_hidden[keep] = d_kept
    return loss, d_hidden, d_weight, d_bias


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: Tensor | None, form: _Form,
    wants: _Wants, rows: int, compute: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    w, b = weight.to(compute), None if bias is None else bias.to(compute)
    loss = torch.zeros((), dtype=_accumulate_dtype(hidden), device=hidden.device)
    d_hidden = torch.empty_like(hidden) if wants.hidden else None
    # fp32 however low the weight's precision: chunks add up thousands of rows.
    d_weight = torch.empty_like(weight, dtype=loss.dtype) if wants.weight else None
    d_bias = torch.zeros_like(bias, dtype=loss.dtype) if bias is not None and wants.bias else None
    for start in range(0, labels.numel(), rows):
        part = slice(start, start + rows)
        h, count = _filled(hidden[part].to(compute))
        z = F.linear(h, w, b) if b is not None else multiply(h, w.T)
        loss += _cross_entropy(z[:count], labels[part], factor, form, any(wants))
        z[count:] = 0
        if d_hidden is not None:
            d_hidden[part] = multiply(z, w)[:count]
        if d_weight is not None:
            _add_rows(d_weight, z, h, first=start == 0)
        if d_bias is not None:
            d_bias += z.sum(0, dtype=loss.dtype)
        del z  # before the next one is made
    if d_weight is not None and not labels.numel():
        d_weight.zero_()
    return loss if factor is None else loss * factor, d_hidden, d_weight, d_bias


def _add_rows(total: Tensor, z: Tensor, h: Tensor, *, first: bool) -> None:
    """Add z.T @ h to total [V, h], which holds nothing yet at the `first` call; the product never exists whole."""
    size = h.shape[1] * h.element_size()
    rows = total.shape[0] if total.device.type != "cpu" else max(64, _SUM_BYTES // size // 64 * 64)
    for part, columns in zip(torch.split(total, rows), torch.split(z, rows, dim=1), strict=True):
        product = multiply(columns.T, h)
        if first:
            part.copy_(product)
        else:
            part.add_(product)


def _filled(h: Tensor) -> tuple[Tensor, int]:
    """Rows up to a multiple of 64 on a CPU, where oneDNN keeps code for every new shape; and how many are real."""
    count = h.shape[0]
    return (F.pad(h, (0, 0, 0, -count % _ROWS)) if h.device.type == "cpu" else h), count


def _cross_entropy(z: Tensor, labels: Tensor, factor: Tensor | None, form: _Form, gradient: bool) -> Tensor:
    """The summed loss of z [rows, V] = hidden @ weight.T + bias; `factor` by its gradient replaces z if wanted."""
    if _runs_triton(z, z.dtype):
        from llamahome.kernels.loss_triton import cross_entropy

        losses: Tensor = cross_entropy(z, labels, factor, *form, IGNORE_INDEX, gradient)
        return losses.sum()
    if form == _PLAIN and fits_native(z):
        by = 1.0 if factor is None else float(factor)
        total: Tensor = native_cross_entropy(z, labels, by, gradient=gradient).sum()
        return total
    rows = max(1, _BLOCK_BYTES // (4 * z.shape[1]))
    blocks = zip(torch.split(z, rows), torch.split(labels, rows), strict=True)
    return torch.stack([_block(block, y, factor, form, gradient) for block, y in blocks]).sum()


def _block(z: Tensor, labels: Tensor, factor: Tensor | None, form: _Form, gradient: bool) -> Tensor:
    """`_cross_entropy` of a few rows in plain PyTorch."""
    at = labels[:, None]
    x, slope = _bend(z.to(_accumulate_dtype(z)), form)
    picked = x.gather(1, at)
    mean = x.mean(1, keepdim=True) if form.label_smoothing else picked
    x.scatter_(1, at, float("-inf"))
    peak = x.amax(1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)
    x.sub_(peak).exp_()
    gap = peak + x.sum(1, keepdim=True).log() - picked
    nll = torch.logaddexp(gap, torch.zeros_like(gap))
    lse = picked + nll
    loss = nll + form.label_smoothing * (picked - mean) + form.z_loss * lse * lse
    if gradient:
        growth = 1 + 2 * form.z_loss * lse
        x.mul_((peak - lse).exp_() * growth)
        own = torch.expm1(-nll) + form.label_smoothing + 2 * form.z_loss * lse * torch.exp(-nll)
        x.scatter_(1, at, own)
        if form.label_smoothing:
            x -= form.label_smoothing / x.shape[1]
        slope = slope if factor is None else slope * factor
        z.copy_(x if isinstance(slope, float) and slope == 1.0 else x.mul_(slope))
    return loss.sum()


def _bend(z: Tensor, form: _Form) -> tuple[Tensor, Tensor | float]:
    """The logits, z itself where nothing is to be done, and their derivative by z."""
    x = z.to(_accumulate_dtype(z))
    if form.logit_scale != 1.0:
        x = x * form.logit_scale
    if not form.softcap:
        return x, form.logit_scale
    bent = torch.tanh(x / form.softcap)
    return form.softcap * bent, form.logit_scale * (1 - bent * bent)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    compute = _compute_dtype(hidden)
    z = F.linear(hidden.to(compute), weight.to(compute), None if bias is None else bias.to(compute))
    return _bend(z, _Form(scale, softcap, 0.0, 0.0))[0]


def _runs_triton(x: Tensor, dtype: torch.dtype) -> bool:
    return use_triton(x) and dtype != torch.float64


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
