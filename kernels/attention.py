"""Attention over one flat row of packed samples.

Work and memory are proportional to the sum of squared sample lengths: no T x T mask exists, and no token sees
another sample. Saved for backward: q, k, v, the output and the log-sum-exp (FlashAttention-2, arXiv 2307.08691).
On a GPU it runs the Triton kernels of `attention_triton.py`, or torch's FlashAttention where that is faster and gives
the same bits each time; on a CPU the C++ code of `attention_native.py` (bf16 on AVX512-BF16, fp32 on AVX-512) or ATen's
flash kernel, sample by sample, or the same Triton kernels under TRITON_INTERPRET=1.

Shapes: T tokens, Hq query heads, Hk key and value heads (Hq a multiple of Hk), D head size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamahome.kernels.attention_dense import dense_backward, prefers_dense
from llamahome.kernels.attention_native import fits_native, native_backward, native_forward
from llamahome.kernels.launch import use_triton

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_HAS_VARLEN_ATTN = importlib.util.find_spec("torch.nn.attention.varlen") is not None
_DEVICES = ("cpu", "cuda")
_MIN_ROWS = 128  # of a block under a sliding window: shorter ones cost more calls than they save work


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
        visible = _visible(0, end - start, window, q.device)
        scores = scores.masked_fill(~visible, float("-inf"))
        out.append((scores.to(_lse_dtype(q)).softmax(-1).to(v.dtype) @ v_s).transpose(0, 1))
    tail = q.shape[0] - int(cu_seqlens[-1])
    if tail:
        out.append(q.new_zeros(tail, *q.shape[1:]))
    return torch.cat(out)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Causal attention within each packed sample; differentiable once.

    Args:
        q: [T, Hq, D]; k, v: [T, Hk, D]; one dtype of fp64, fp32, bf16, fp16.
        cu_seqlens: int32 [n + 1], boundaries of the samples, rising from 0. Tokens past the last one give zeros and get
            zeros as gradients, whatever finite numbers they hold.
        scale: factor on the scores, usually D ** -0.5.
        window: a token sees itself and the `window - 1` before it; 0 means the whole sample.
        softcap: scores become softcap * tanh(scores / softcap); 0 means off.

    Returns: [T, Hq, D] in the dtype of q.
    """
    if prefers_library(q, cu_seqlens, window, softcap):
        return _library_attention(q, k, v, cu_seqlens, scale)
    if not _has_kernel(q, softcap):
        return varlen_attention_reference(q, k, v, cu_seqlens, scale, window, softcap)
    if type(q) is Tensor and not torch.compiler.is_compiling():  # the operator adds some 50 us a call
        out: Tensor = _Attention.apply(q, k, v, cu_seqlens, scale, window, softcap)  # type: ignore[no-untyped-call]
    else:
        out = _varlen(q, k, v, cu_seqlens, scale, window, softcap)[0]
    return out


def prefers_library(q: Tensor, cu_seqlens: Tensor, window: int, softcap: float) -> bool:
    """Whether torch's `varlen_attn` (FlashAttention) does better than the Triton kernels, with the same bits each time.

    By published and counted figures, not measured here: its backward pass does 5 matrix products where ours does 7, on
    NVIDIA from sm_80. But it sums dQ in no fixed order, and a resumed training must give the same bits, so where a
    gradient is asked for only under `torch.use_deterministic_algorithms`, which fixes the order. It starts programs
    for T rows of every sample, so only samples of at least 1,024 tokens on average.
    """
    trains = torch.is_grad_enabled() and q.requires_grad
    return (
        q.device.type == "cuda"
        and torch.version.hip is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and not (window or softcap)
        and (not trains or torch.are_deterministic_algorithms_enabled())
        and q.shape[2] % 8 == 0
        and q.shape[2] <= 256
        and q.shape[0] >= 1024 * (cu_seqlens.shape[0] - 1)
        and _HAS_VARLEN_ATTN
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _library_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Without a host sync: the tail is given to the last sample, which cannot see what comes after it, and zeroed."""
    from torch.nn.attention.varlen import varlen_attn

    total = q.shape[0]
    edges = torch.cat([cu_seqlens[:-1], cu_seqlens.new_full((1,), total)])
    out: Any = varlen_attn(q, k, v, edges, edges, total, total, scale=scale, window_size=(-1, 0), enable_gqa=True)
    inside = torch.arange(total, device=q.device) < cu_seqlens[-1]
    return torch.where(inside[:, None, None], out, 0)


def _has_kernel(q: Tensor, softcap: float) -> bool:
    return _runs_triton(q) or (q.device.type == "cpu" and not softcap)


def _runs_triton(q: Tensor) -> bool:
    return use_triton(q) and q.dtype != torch.float64


class _Attention(torch.autograd.Function):
    """The eager path: what the operator does, without the dispatcher's cost."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and log-sum-exp [Hq, T], whose base is the backend's own (fp64 for fp64 inputs, else fp32)."""
    if _runs_triton(q):
        from llamahome.kernels.attention_triton import forward

        result: tuple[Tensor, Tensor] = forward(q, k, v, cu_seqlens, scale, window, softcap)
        return result
    if fits_native(q, k, cu_seqlens, scale, window):
        made: tuple[Tensor, Tensor] = native_forward(q, k, v, cu_seqlens, scale)
        return made
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=_lse_dtype(q))
    for rows, keys, mask in _pieces(q, cu_seqlens, window):
        parts = _heads_first(q[rows], k[keys], v[keys])
        out_s, lse_s = _flash_forward(*parts, 0.0, mask is None, attn_mask=mask, scale=scale)
        out[rows] = out_s[0].transpose(0, 1)
        lse[:, rows] = lse_s[0]
    return out, lse


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float,
    window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _runs_triton(q):
        from llamahome.kernels.attention_triton import backward

        grads: tuple[Tensor, Tensor, Tensor] = backward(grad, q, k, v, out, lse, cu_seqlens, scale, window, softcap)
        return grads
    if fits_native(q, k, cu_seqlens, scale, window):
        made: tuple[Tensor, Tensor, Tensor] = native_backward(grad, q, k, v, out, lse, cu_seqlens, scale)
        return made
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, keys, mask in _pieces(q, cu_seqlens, window):
        parts = _heads_first(grad[rows], q[rows], k[keys], v[keys], out[rows])
        if mask is None and prefers_dense(q[rows]):
            dq_s, dk_s, dv_s = (part[None] for part in dense_backward(*(part[0] for part in parts[:4]), scale))
        else:
            # The kernel wants the log-sum-exp with the heads innermost, as its own forward returns it.
            lse_s = lse[:, rows].t().contiguous().t().unsqueeze(0)
            dq_s, dk_s, dv_s = _flash_backward(*parts, lse_s, 0.0, mask is None, attn_mask=mask, scale=scale)
        dq[rows] = dq_s[0].transpose(0, 1)
        dk[keys] += dk_s[0].transpose(0, 1)
        dv[keys] += dv_s[0].transpose(0, 1)
    return dq, dk, dv


_varlen = torch.library.custom_op("llamahome::varlen_attention", _forward, mutates_args=(), device_types=_DEVICES)
_varlen_backward = torch.library.custom_op(
    "llamahome::varlen_attention_backward", _gradients, mutates_args=(), device_types=_DEVICES
)


@_varlen.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=_lse_dtype(q))


@_varlen_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float,
    window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return *_varlen_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


# torch calls the keyword `inputs, output`: the names of _setup_context's arguments are part of its contract.
_varlen.register_autograd(_backward, setup_context=_setup_context)


def _bounds(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    edges = cu_seqlens.tolist()
    return ((start, end) for start, end in pairwise(edges) if end > start)


def _pieces(q: Tensor, cu_seqlens: Tensor, window: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Rows, the keys that they see, and an additive mask [1, 1, rows, keys], or None where plain causal does.

    A sample longer than the window is cut into blocks of rows, so that work and memory grow with length times window.
    """
    for start, end in _bounds(cu_seqlens):
        if not window or end - start <= window:
            yield slice(start, end), slice(start, end), None
            continue
        size = max(window, _MIN_ROWS)
        for first in range(start, end, size):
            last, key = min(first + size, end), max(first - window + 1, start)
            yield slice(first, last), slice(key, last), _window_mask(q, first - key, last - key, window)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[T, H, D] -> views [1, H, T, D]."""
    return [x.transpose(0, 1).unsqueeze(0) for x in tensors]


def _visible(first: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[keys - first, keys] bool: may the row at `first`, `first + 1`, ... attend to the key."""
    distance = torch.arange(first, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window) if window else distance >= 0


def _window_mask(q: Tensor, first: int, keys: int, window: int) -> Tensor:
    hidden = ~_visible(first, keys, window, q.device)
    return torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))[None, None]


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
