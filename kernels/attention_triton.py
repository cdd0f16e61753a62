"""Launches the attention kernels: layouts, tiles, outputs. Arguments and shapes as in `attention.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llamahome.kernels.attention_kernels_triton import dkv_kernel, dq_kernel, forward_kernel, token_bounds_kernel
from llamahome.kernels.cases import ARCHS
from llamahome.kernels.launch import (
    INTERPRETER,
    LaunchConfig,
    StaticCase,
    aligned,
    architecture,
    candidates,
    choose_config,
    has_tensor_descriptors,
)

_TOKENS_PER_PROGRAM = 1024  # of the small kernel that finds the samples' bounds


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int = 0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and the log-sum-exp [Hq, T], fp32 in base-2 units. Arguments as of `varlen_attention`."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    window = _bounded(window, q)
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

    _launch("attention_forward", _shape_class(q, tma), q, launch)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float,
    window: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK and dV from what `forward` took and gave; `grad` is [T, Hq, D]."""
    grad, q, k, v = aligned(grad), aligned(q), aligned(k), aligned(v)
    window = _bounded(window, q)
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
        for part in _parts("dkv", config):
            dkv_kernel[triton.cdiv(k.shape[0], bn), k.shape[1]](
                *inputs, _tiles(dk, bn, tma), _tiles(dv, bn, tma), lse, delta, end, q.shape[0],
                *_strides(q, k, v, grad), dk.stride(0), *rest, **constants, **part, **_resources(config),
            )  # fmt: skip

    shape = _shape_class(q, tma) + ("_softcap" if softcap else "")
    _launch("attention_dq", shape, q, launch_dq)
    _launch("attention_dkv", shape, q, launch_dkv)
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
            token_bounds_kernel[(triton.cdiv(tokens, _TOKENS_PER_PROGRAM),)](
                cu_seqlens, start, end, tokens, samples, (samples + 1).bit_length(), BLOCK=_TOKENS_PER_PROGRAM
            )
    return start, end


def _launch(kernel: str, shape: str, q: Tensor, launch: Callable[[LaunchConfig], None]) -> None:
    if q.shape[0]:
        with torch.cuda.device_of(q):
            launch(choose_config(kernel, shape, q.device, launch))


def _bounded(window: int, q: Tensor) -> int:
    """0 for a window that hides nothing: its masks would cost, and a huge one overflow."""
    return window if window < q.shape[0] else 0


def _shape_class(q: Tensor, tma: bool) -> str:
    access = "fp32_" if q.dtype == torch.float32 else "tma" if tma else "pointers"
    return f"{access}{max(64, _padded(q.shape[2]))}"


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def _by_descriptor(*tensors: Tensor) -> bool:
    """Whether tiles come by tensor descriptor: hardware that has them, D a power of two, heads side by side.

    Not in fp32, whose exact products by-pass the tensor cores: from descriptors they spill.
    """
    size = tensors[0].shape[2]
    arch = architecture(tensors[0].device)
    return (
        has_tensor_descriptors(arch)
        and (tensors[0].element_size() == 2 or arch == INTERPRETER)
        and size == _padded(size)
        and all(x.stride(1) == size or x.shape[1] == 1 for x in tensors)
    )


def _tiles(x: Tensor, rows: int, tma: bool) -> Any:
    """What a kernel takes for x: the tensor itself, or a descriptor of [T, H * D] by tiles of one head."""
    if not tma:
        return x
    row = x.shape[1] * x.shape[2]
    stride = x.stride(0) if x.shape[0] > 1 else row  # that of a single row may be anything
    return TensorDescriptor(x, [x.shape[0], row], [stride, 1], [rows, x.shape[2]])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _constants(q: Tensor, window: int, softcap: float, tma: bool) -> dict[str, Any]:
    size = q.shape[2]
    return {"D": size, "BD": _padded(size), "WINDOW": window > 0, "SOFTCAP": softcap, "TMA": tma}


def _resources(config: LaunchConfig) -> dict[str, int]:
    return {
        "BM": config.block_m, "BN": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


class _Shape(NamedTuple):
    """A production shape: head size, window, soft-cap, and the architectures that its launches are compiled for."""

    name: str
    size: int
    window: bool
    softcap: float
    archs: tuple[str, ...]


_SHAPES = (
    _Shape("d64", 64, False, 0.0, ARCHS),
    _Shape("d128", 128, False, 0.0, ARCHS),
    _Shape("d96", 96, False, 0.0, ("sm_90",)),
    _Shape("d128_window_softcap", 128, True, 50.0, ("sm_90",)),
    _Shape("d256_window_softcap", 256, True, 50.0, ("sm_90",)),
)


def static_cases() -> list[StaticCase]:
    """What the static gate compiles: bf16, the default tiles of each architecture and all that tuning may choose."""
    cases = {"token_bounds": _token_bounds_case()}
    for shape in _SHAPES:
        for arch in shape.archs:
            for case in _cases(shape, arch):
                archs = (*cases[case.name].archs, arch) if case.name in cases else (arch,)
                cases[case.name] = case._replace(archs=archs)
    return list(cases.values())


def _token_bounds_case() -> StaticCase:
    types = {
        "edges_ptr": "*i32",
        "start_ptr": "*i32",
        "end_ptr": "*i32",
        "T": "i32",
        "samples": "i32:1",
        "steps": "i32:1",
    }
    constants = {"BLOCK": _TOKENS_PER_PROGRAM}
    archs = ("sm_90", "gfx942")
    return StaticCase("token_bounds", token_bounds_kernel, types | {"BLOCK": "constexpr"}, constants, 4, 2, archs)


def _cases(shape: _Shape, arch: str) -> Iterator[StaticCase]:
    """The launches of one shape on one architecture; equal ones of two architectures have equal names."""
    tma = has_tensor_descriptors(arch) and shape.size == _padded(shape.size)
    access = "tma" if tma else "pointers"
    for kernel, function in (("forward", forward_kernel), ("dq", dq_kernel), ("dkv", dkv_kernel)):
        class_ = f"{access}{_padded(shape.size)}" + ("_softcap" if shape.softcap else "")
        for config in candidates(f"attention_{kernel}", class_, arch):
            yield from _launches(shape, arch, kernel, function, config, tma)


def _launches(
    shape: _Shape, arch: str, kernel: str, function: Any, config: LaunchConfig, tma: bool
) -> Iterator[StaticCase]:
    constants = {
        "D": shape.size, "BD": _padded(shape.size), "WINDOW": shape.window, "SOFTCAP": shape.softcap, "TMA": tma,
        "BM": config.block_m, "BN": config.block_n,
    }  # fmt: skip
    signature = {name: _type(name, constants) for name in function.arg_names}
    tiles = f"{'tma' if tma else 'pointers'}_{config.block_m}x{config.block_n}_{config.num_stages}"
    for part in _parts(kernel, config):
        output = "dk" if part == {"DK": True, "DV": False} else "dv" if part == {"DK": False, "DV": True} else kernel
        yield StaticCase(
            f"attention_{output}_{shape.name}_{tiles}", function, signature, constants | part, config.num_warps,
            config.num_stages, (arch,),
        )  # fmt: skip


def _parts(kernel: str, config: LaunchConfig) -> tuple[dict[str, bool], ...]:
    """The constants of each launch that one call makes."""
    if kernel != "dkv":
        return ({},)
    return ({"DK": True, "DV": False}, {"DK": False, "DV": True}) if config.split else ({"DK": True, "DV": True},)


def _type(argument: str, constants: dict[str, Any]) -> str:
    """The type of a kernel's argument as `ASTSource` takes it; `i32:1` is no multiple of 16."""
    if argument in ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr"):
        rows = constants["BN" if argument[-5] in "kv" else "BM"]
        return f"tensordesc<bf16[{rows}, {constants['D']}]>" if constants["TMA"] else "*bf16"
    if argument in ("lse_ptr", "delta_ptr"):
        return "*fp32"
    if argument in ("start_ptr", "end_ptr"):
        return "*i32"
    if argument == "scale":
        return "fp32"
    if argument in ("group", "window"):
        return "i32:1"
    return "constexpr" if argument.isupper() and argument != "T" else "i32"
