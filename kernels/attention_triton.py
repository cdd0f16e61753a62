"""Launches the attention kernels: layouts, tiles, outputs. Arguments and shapes as in `attention.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llamahome.kernels.attention_kernels_triton import dkv_kernel, dq_kernel, forward_kernel, token_bounds_kernel
from llamahome.kernels.launch import LaunchConfig, aligned, architecture, choose_config, has_tensor_descriptors


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int = 0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and the log-sum-exp [Hq, T], fp32 in base-2 units. Arguments as of `varlen_attention`."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    start, _ = token_bounds(cu_seqlens, q.shape[0])
    tma = _by_descriptor(q, k, v)

    def launch(config: LaunchConfig) -> None:
        bm, bn = config.block_m, config.block_n
        tensors = (_tiles(q, bm, tma), _tiles(k, bn, tma), _tiles(v, bn, tma), _tiles(out, bm, tma))
        forward_kernel[triton.cdiv(q.shape[0], bm), q.shape[1]](
            *tensors, lse, start, q.shape[0], *_strides(q, k, v), out.stride(0), scale, q.shape[1] // k.shape[1],
            window, **_constants(q, window, softcap, tma), **_resources(config),
        )  # fmt: skip

    _launch("attention_forward", q, tma, launch)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float,
    window: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK and dV from what `forward` took and gave; `grad` is [T, Hq, D]."""
    grad, q, k, v = aligned(grad), aligned(q), aligned(k), aligned(v)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    start, end = token_bounds(cu_seqlens, q.shape[0])
    tma = _by_descriptor(q, k, v, grad)
    rest = (scale, q.shape[1] // k.shape[1], window)
    constants = _constants(q, window, softcap, tma)

    def launch_dq(config: LaunchConfig) -> None:
        bm, bn = config.block_m, config.block_n
        inputs = (
            _tiles(q, bm, tma),
            _tiles(k, bn, tma),
            _tiles(v, bn, tma),
            *(_tiles(x, bm, tma) for x in (out, grad)),
        )
        dq_kernel[triton.cdiv(q.shape[0], bm), q.shape[1]](
            *inputs, _tiles(dq, bm, tma), lse, delta, start, q.shape[0], *_strides(q, k, v), out.stride(0),
            *_strides(grad), *rest, **constants, **_resources(config),
        )  # fmt: skip

    def launch_dkv(config: LaunchConfig) -> None:
        bm, bn = config.block_m, config.block_n
        inputs = (_tiles(q, bm, tma), _tiles(k, bn, tma), _tiles(v, bn, tma), _tiles(grad, bm, tma))
        dkv_kernel[triton.cdiv(k.shape[0], bn), k.shape[1]](
            *inputs, _tiles(dk, bn, tma), _tiles(dv, bn, tma), lse, delta, end, q.shape[0], *_strides(q, k, v, grad),
            dk.stride(0), *rest, **constants, **_resources(config),
        )  # fmt: skip

    _launch("attention_dq", q, tma, launch_dq)
    _launch("attention_dkv", q, tma, launch_dkv)
    return dq, dk, dv


def token_bounds(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's first token of its sample and the one past its last, int32 [T], both never falling.

    A token past the last boundary has start = T and end = its own place, so it sees nothing and is seen by nothing.
    One small launch, cheaper than 8 bytes per token kept for the backward pass.
    """
    start = torch.empty(tokens, dtype=torch.int32, device=cu_seqlens.device)
    end = torch.empty_like(start)
    samples = cu_seqlens.shape[0] - 1
    if tokens:
        with torch.cuda.device_of(cu_seqlens):
            token_bounds_kernel[(triton.cdiv(tokens, 1024),)](
                cu_seqlens, start, end, tokens, samples, (samples + 1).bit_length(), BLOCK=1024
            )
    return start, end


def _launch(kernel: str, q: Tensor, tma: bool, launch: Any) -> None:
    if q.shape[0]:
        with torch.cuda.device_of(q):
            launch(choose_config(kernel, _shape_class(q, tma), q.device, launch))


def _shape_class(q: Tensor, tma: bool) -> str:
    access = "fp32_" if q.dtype == torch.float32 else "tma" if tma else "pointers"
    return f"{access}{_padded(q.shape[2])}"


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def _by_descriptor(*tensors: Tensor) -> bool:
    """Whether tiles come by tensor descriptor: hardware that has them, D a power of two, heads side by side."""
    size = tensors[0].shape[2]
    return (
        has_tensor_descriptors(architecture(tensors[0].device))
        and size == _padded(size)
        and all(x.stride(1) == size or x.shape[1] == 1 for x in tensors)
    )


def _tiles(x: Tensor, rows: int, tma: bool) -> Any:
    """What a kernel takes for x: the tensor itself, or a descriptor of [T, H * D] by tiles of one head."""
    if not tma:
        return x
    return TensorDescriptor(x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], [rows, x.shape[2]])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _constants(q: Tensor, window: int, softcap: float, tma: bool) -> dict[str, Any]:
    size = q.shape[2]
    return {"D": size, "BD": _padded(size), "WINDOW": window > 0, "SOFTCAP": softcap, "TMA": tma}


def _resources(config: LaunchConfig) -> dict[str, int]:
    return {
        "BM": config.block_m, "BN": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
