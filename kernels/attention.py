"""Attention over one flat row of packed samples.

Work and memory are proportional to the sum of squared sample lengths: no T x T mask exists, and no token sees
another sample. Saved for backward: q, k, v, the output and the log-sum-exp (FlashAttention-2, arXiv 2307.08691).

Shapes: T tokens, Hq query heads, Hk key and value heads (Hq a multiple of Hk), D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """The plain definition, sample by sample, with explicit scores; differentiable, any device and dtype.

    Same arguments and result as `varlen_attention`.
    """
    out = []
    groups = q.shape[1] // k.shape[1]
    for start, end in _bounds(cu_seqlens):
        q_s = q[start:end].transpose(0, 1)
        k_s = k[start:end].transpose(0, 1).repeat_interleave(groups, 0)
        v_s = v[start:end].transpose(0, 1).repeat_interleave(groups, 0)
        scores = (q_s @ k_s.transpose(1, 2)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = _visible(end - start, window, q.device)
        scores = scores.masked_fill(~visible, float("-inf"))
        out.append((scores.float().softmax(-1).to(v.dtype) @ v_s).transpose(0, 1))
    tail = q.shape[0] - int(cu_seqlens[-1])
    if tail:
        out.append(q.new_zeros(tail, *q.shape[1:]))
    return torch.cat(out)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Causal attention within each packed sample.

    Args:
        q: [T, Hq, D]; k, v: [T, Hk, D]; one dtype of fp64, fp32, bf16, fp16.
        cu_seqlens: int32 [n + 1], boundaries of the samples, rising from 0. Tokens past the last one give zeros.
        scale: factor on the scores, usually D ** -0.5.
        window: a token sees itself and the `window - 1` before it; 0 means the whole sample.
        softcap: scores become softcap * tanh(scores / softcap); 0 means off.

    Returns: [T, Hq, D] in the dtype of q.
    """
    if softcap or q.device.type != "cpu":
        return varlen_attention_reference(q, k, v, cu_seqlens, scale, window, softcap)
    out: Tensor = _varlen_cpu(q, k, v, cu_seqlens, scale, window)[0]
    return out


@torch.library.custom_op("llamahome::varlen_attention", mutates_args=(), device_types="cpu")
def _varlen_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq] (fp32, or fp64 for fp64 inputs)."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(q.shape[:2], dtype=_lse_dtype(q))
    for start, end in _bounds(cu_seqlens):
        mask = _window_mask(q, end - start, window)
        q_s, k_s, v_s = _heads_first(start, end, q, k, v)
        out_s, lse_s = _flash_forward(q_s, k_s, v_s, 0.0, mask is None, attn_mask=mask, scale=scale)
        out[start:end] = out_s[0].transpose(0, 1)
        lse[start:end] = lse_s[0].transpose(0, 1)
    return out, lse


@_varlen_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=_lse_dtype(q))


@torch.library.custom_op("llamahome::varlen_attention_backward", mutates_args=(), device_types="cpu")
def _varlen_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for start, end in _bounds(cu_seqlens):
        mask = _window_mask(q, end - start, window)
        g, q_s, k_s, v_s, o_s = _heads_first(start, end, grad, q, k, v, out)
        # The kernel wants the log-sum-exp with the heads innermost, as its own forward returns it.
        lse_s = lse[start:end].transpose(0, 1).unsqueeze(0)
        parts = _flash_backward(g, q_s, k_s, v_s, o_s, lse_s, 0.0, mask is None, attn_mask=mask, scale=scale)
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            whole[start:end] = part[0].transpose(0, 1)
    return dq, dk, dv


@_varlen_cpu_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
    q, k, v, cu_seqlens, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, grad, _grad_lse):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = _varlen_cpu_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.scale, ctx.window)
    return *grads, None, None, None


_varlen_cpu.register_autograd(_backward, setup_context=_setup_context)


def _bounds(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    edges = cu_seqlens.tolist()
    return ((start, end) for start, end in pairwise(edges) if end > start)


def _heads_first(start: int, end: int, *tensors: Tensor) -> list[Tensor]:
    """[T, H, D] -> views [1, H, end - start, D]."""
    return [x[start:end].transpose(0, 1).unsqueeze(0) for x in tensors]


def _visible(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length] bool: may row attend to column."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window) if window else distance >= 0


def _window_mask(q: Tensor, length: int, window: int) -> Tensor | None:
    """Additive mask [1, 1, length, length], or None where the plain causal kernel does."""
    if not window or length <= window:
        return None
    hidden = ~_visible(length, window, q.device)
    return torch.zeros(length, length, dtype=q.dtype).masked_fill_(hidden, float("-inf"))[None, None]


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
