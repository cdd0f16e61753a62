"""Output projection and cross-entropy in one pass, in chunks of rows: logits [tokens, vocabulary] never exist whole.

The gradient of the hidden states is made in the forward pass, while a chunk's logits are at hand, as in Liger's
fused linear cross-entropy (arXiv 2410.10989). A frozen weight costs no gradient.

Shapes: N rows (tokens that are trained), h hidden size, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
_ROWS = 64  # chunks are filled up to a multiple of it
_CHUNK_BYTES = 64 << 20  # of fp32 logits; beyond it larger chunks no longer speed the matrix product up


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The plain definition with whole logits; same arguments and result as `linear_cross_entropy`."""
    logits = _logits(hidden, weight, bias, logit_scale, softcap)
    return F.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction=reduction
    )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
    chunk_rows: int = 0,
) -> Tensor:  # fmt: skip
    """Cross-entropy of softmax(softcap(logit_scale * (hidden @ weight.T + bias))) against labels.

    Args:
        hidden: [N, h], floating; weight: [V, h]; bias: [V] or None.
        labels: int64 [N]; rows with -100 count for nothing. They must already be the next tokens.
        reduction: "mean" over the rows that count, or "sum".
        chunk_rows: rows per chunk; 0 chooses by the vocabulary's size.

    Returns: a scalar, fp32 (fp64 for fp64 inputs). Under autocast the products run in autocast's dtype.
    Raises: ValueError for another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    keep = labels != IGNORE_INDEX
    if not bool(keep.all()):
        hidden, labels = hidden[keep], labels[keep]
    rows = chunk_rows or chunk_rows_for(weight.shape[0])
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, logit_scale, softcap, label_smoothing, rows
    )
    return total / labels.numel() if reduction == "mean" else total


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


def chunk_rows_for(vocabulary: int) -> int:
    """Rows per chunk so that a chunk's fp32 logits stay near 64 MiB, between 128 and 4,096 rows."""
    return max(128, min(4096, _CHUNK_BYTES // (4 * vocabulary) // 64 * 64))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,  # noqa: ANN001
        logit_scale: float, softcap: float, smoothing: float, rows: int,
    ) -> Tensor:  # fmt: skip
        compute = _compute_dtype(hidden)
        w, b = weight.to(compute), None if bias is None else bias.to(compute)
        loss = torch.zeros((), dtype=_accumulate_dtype(hidden), device=hidden.device)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        # fp32 however low the weight's precision: chunks add up thousands of rows.
        d_weight = torch.zeros_like(weight, dtype=loss.dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=loss.dtype) if bias is not None and needs_bias else None
        for start in range(0, labels.numel(), rows):
            part = slice(start, start + rows)
            h = hidden[part].to(compute)
            count = h.shape[0]
            # oneDNN keeps code for every new shape, and the last chunk would bring one each time.
            h = F.pad(h, (0, 0, 0, -count % _ROWS))
            chunk_loss, d_logits = _chunk(F.linear(h, w, b)[:count], labels[part], logit_scale, softcap, smoothing)
            loss += chunk_loss
            d_logits = F.pad(d_logits, (0, 0, 0, -count % _ROWS))
            if d_hidden is not None:
                d_hidden[part] = (d_logits.to(compute) @ w)[:count]
            if d_weight is not None:
                d_weight += d_logits.to(compute).T @ h
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden * grad,
            None if d_weight is None else (d_weight * grad).to(weight_dtype),
            None if d_bias is None else (d_bias * grad).to(bias_dtype),
            *[None] * 5,
        )


def _chunk(z: Tensor, labels: Tensor, scale: float, softcap: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """Summed loss and d loss / d z [rows, V], where z = hidden @ weight.T + bias; both in fp32 (or fp64)."""
    logits = z.to(_accumulate_dtype(z))
    if scale != 1.0:
        logits = logits * scale
    bent = torch.tanh(logits / softcap) if softcap else None
    if bent is not None:
        logits = softcap * bent
    lse = logits.logsumexp(-1, keepdim=True)
    picked = logits.gather(1, labels[:, None])
    loss = (lse - picked).sum()
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (lse[:, 0] - logits.mean(-1)).sum()
    grad = logits.sub_(lse).exp_()
    grad.scatter_add_(1, labels[:, None], torch.full_like(picked, smoothing - 1))
    if smoothing:
        grad -= smoothing / z.shape[1]
    if bent is not None:
        grad *= 1 - bent * bent
    return loss, grad.mul_(scale) if scale != 1.0 else grad


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    compute = _compute_dtype(hidden)
    z = F.linear(hidden.to(compute), weight.to(compute), None if bias is None else bias.to(compute))
    logits = z.to(_accumulate_dtype(z)) * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
