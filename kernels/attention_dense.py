"""Attention's gradient for one short sample in bf16 or fp16 on a CPU, by whole score matrices.

ATen's flash kernel for CPUs (torch 2.13) takes five times its forward pass for the gradient of a sample of 100 tokens
in bf16, and a bf16 product of the CPU's matrix library costs half of an fp32 one. So scores, [L, L] per head, are made
in fp32 as there, while the four products that read rounded tensors anyway run in the low precision.

Shapes: L tokens of the sample, Hq query heads, Hk key and value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCORES = 4 << 20  # of all heads together: 16 MiB each in fp32


def prefers_dense(q: Tensor) -> bool:
    """Whether `dense_backward` is the faster way for queries [L, Hq, D]."""
    length, heads, _ = q.shape
    return q.dtype in (torch.bfloat16, torch.float16) and heads * length * length <= _SCORES


def dense_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of causal attention; grad, q and dq are [Hq, L, D], the others [Hk, L, D]."""
    heads, length, size = q.shape
    rows = k.shape[0], heads // k.shape[0] * length, -1  # the query heads of one key head, one below the other
    q, grad, k, v = q.reshape(rows), grad.reshape(rows), k.contiguous(), v.contiguous()
    hidden = q.new_full((length, length), float("-inf"), dtype=torch.float32).triu_(1)
    scores = torch.bmm(q.float().mul_(scale), k.float().transpose(1, 2)).view(heads, length, length)
    p = torch.softmax(scores.add_(hidden), -1)
    del scores
    d_p = torch.bmm(grad, v.transpose(1, 2)).view(heads, length, length).float()
    d_scores = torch._softmax_backward_data(d_p, p, -1, torch.float32).mul_(scale).to(q.dtype).view(rows)
    del d_p
    dv = torch.bmm(p.to(q.dtype).view(rows).transpose(1, 2), grad)
    dk = torch.bmm(d_scores.transpose(1, 2), q)
    return torch.bmm(d_scores, k).view(heads, length, size), dk, dv
