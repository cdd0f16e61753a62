"""How the Triton kernels are launched: where, with which tiles, on which pointers. Imports without Triton.

A default configuration is a row of a table, found by kernel, shape class and architecture, so that the same inputs give
the same bits on the same kind of device. Timing candidates instead is opt-in (`LLAMAHOME_AUTOTUNE=1`): another winner
is another order of summation.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamahome import files

_HAS_TRITON = importlib.util.find_spec("triton") is not None
ALIGNMENT = 16  # bytes: what a 128-bit load, an asynchronous copy and a tensor descriptor need
INTERPRETER = "interpreter"


class LaunchConfig(NamedTuple):
    """Tiles and resources of one launch: block_m rows by block_n columns (0 where a kernel has one dimension).

    `split` makes two outputs by two launches, where registers do not hold both.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: bool = False


class StaticCase(NamedTuple):
    """A production launch that the static gate compiles: as `triton.compiler.ASTSource` takes it.

    `kernel` is the undecorated-by-autotune jit function, `signature` maps every argument to its type ("*bf16", "i32",
    "fp32", "tensordesc<bf16[64, 128]>", "constexpr"), `constexprs` gives those values, `archs` are names such as
    "sm_90" or "gfx942".
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    archs: tuple[str, ...]


def use_triton(x: Tensor) -> bool:
    """Whether operations on x run Triton kernels: on a GPU, or on a CPU under TRITON_INTERPRET=1."""
    if x.device.type == "cuda":
        return _HAS_TRITON
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and _HAS_TRITON


def architecture(device: torch.device) -> str:
    """Name of the device's kind: "sm_90", "gfx942", or "interpreter" for a CPU."""
    return INTERPRETER if device.type == "cpu" else _gpu_architecture(device.index)


@functools.cache
def _gpu_architecture(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def has_tensor_descriptors(arch: str) -> bool:
    """Whether tiles are copied by descriptor (TMA): sm_90 and sm_100, and the interpreter imitates it."""
    return arch == INTERPRETER or _nearest(arch) in _NEWER


def is_aligned(x: Tensor) -> bool:
    """The last dimension dense, the pointer and every other stride a multiple of 16 bytes."""
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return (
        (x.stride(-1) == 1 or x.shape[-1] == 1)
        and x.data_ptr() % ALIGNMENT == 0
        and all(size == 1 or stride * x.element_size() % ALIGNMENT == 0 for size, stride in outer)
    )


def aligned(x: Tensor) -> Tensor:
    """x, or a dense copy where a kernel would load it narrowly and the copy would not.

    One misaligned operand costs all asynchronous copies and hundreds of spilled bytes; a copy is one read and one
    write. A dense row that is no multiple of 16 bytes long stays so: the launch is right, and slower.
    """
    dense = x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0
    return x if dense or is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


_INTERPRETED = LaunchConfig(32, 32, 4, 1)  # small tiles: small inputs meet every edge
_OLDER = ("sm_80", "sm_86", "sm_89")
_NEWER = ("sm_90", "sm_100")
_ALL = (*_OLDER, *_NEWER, "gfx942")
_EVERY = (*_ALL, INTERPRETER)  # of small kernels, whose production tiles the interpreter is fast enough for


def _c(*configs: tuple[int, int, int, int]) -> tuple[LaunchConfig, ...]:
    return tuple(LaunchConfig(*config) for config in configs)


_POWERS = tuple(2**i for i in range(18))

# (kernel, shape class, architectures, the configuration, then what tuning tries besides it). Chosen by compiled code:
# in 16 bits no spilled register, the alternatives included, tensor-core instructions of the architecture, shared memory
# within its limit; fp32 is there to be right, and spills. None was timed on a GPU. A class of head sizes is named by
# its largest.
_ROWS: tuple[tuple[str, str, tuple[str, ...], tuple[LaunchConfig, ...]], ...] = (
    ("attention_forward", "tma64", _NEWER, _c((128, 64, 8, 3), (128, 128, 8, 2))),
    ("attention_forward", "tma128", _NEWER, _c((128, 128, 8, 2), (128, 64, 8, 3))),
    ("attention_forward", "tma256", _NEWER, _c((128, 64, 8, 2))),
    ("attention_forward", "pointers64", ("sm_80",), _c((128, 64, 8, 3))),
    ("attention_forward", "pointers64", _ALL[1:], _c((128, 64, 8, 2), (64, 64, 4, 2))),
    ("attention_forward", "pointers128", ("sm_80",), _c((128, 64, 8, 3), (64, 64, 4, 2))),
    ("attention_forward", "pointers128", ("sm_86", "sm_89"), _c((128, 32, 8, 2), (64, 32, 4, 2))),
    ("attention_forward", "pointers128", _NEWER, _c((128, 64, 8, 2))),
    ("attention_forward", "pointers128", ("gfx942",), _c((64, 64, 4, 2), (128, 64, 8, 2))),
    ("attention_forward", "pointers256", _OLDER, _c((64, 32, 8, 2))),
    ("attention_forward", "pointers256", _NEWER, _c((128, 32, 8, 2))),
    ("attention_forward", "pointers256", ("gfx942",), _c((64, 32, 4, 1))),
    ("attention_dq", "tma64", _NEWER, _c((128, 64, 8, 2), (128, 128, 8, 2))),
    ("attention_dq", "tma128", ("sm_90",), _c((128, 64, 8, 2), (64, 64, 4, 2))),
    ("attention_dq", "tma128", ("sm_100",), _c((128, 64, 8, 2))),
    ("attention_dq", "tma256", _NEWER, _c((128, 32, 8, 2))),
    ("attention_dq", "pointers64", _OLDER, _c((64, 32, 4, 2))),
    ("attention_dq", "pointers64", _NEWER, _c((128, 64, 8, 2))),
    ("attention_dq", "pointers64", ("gfx942",), _c((64, 64, 4, 2), (64, 32, 4, 2))),
    ("attention_dq", "pointers128", (*_OLDER, "gfx942"), _c((64, 32, 4, 2))),
    ("attention_dq", "pointers128", _NEWER, _c((64, 64, 4, 2))),
    ("attention_dq", "pointers256", _OLDER, _c((64, 32, 8, 1))),
    ("attention_dq", "pointers256", ("sm_90",), _c((64, 32, 8, 2))),
    ("attention_dq", "pointers256", ("sm_100",), _c((64, 32, 8, 1))),
    ("attention_dq", "pointers256", ("gfx942",), _c((64, 32, 4, 1))),
    ("attention_dkv", "tma64", ("sm_90",), _c((64, 128, 8, 2), (32, 128, 8, 2))),
    ("attention_dkv", "tma64", ("sm_100",), _c((64, 128, 8, 2))),
    ("attention_dkv", "tma128", _NEWER, _c((64, 128, 8, 2), (32, 128, 8, 2))),
    ("attention_dkv", "tma128_softcap", _NEWER, _c((32, 128, 8, 2))),
    ("attention_dkv", "tma256", ("sm_90",), (LaunchConfig(32, 64, 8, 2, split=True),)),
    ("attention_dkv", "tma256", ("sm_100",), _c((64, 64, 8, 1))),
    ("attention_dkv", "pointers64", (*_OLDER, "gfx942"), _c((32, 64, 4, 2), (64, 64, 4, 2))),
    ("attention_dkv", "pointers64", _NEWER, _c((32, 128, 8, 2))),
    ("attention_dkv", "pointers128", (*_OLDER, "gfx942"), _c((32, 64, 4, 2))),
    ("attention_dkv", "pointers128", _NEWER, _c((32, 128, 8, 2))),
    ("attention_dkv", "pointers256", (*_OLDER, "gfx942"), _c((32, 32, 4, 1))),
    ("attention_dkv", "pointers256", ("sm_90",), (LaunchConfig(32, 64, 8, 2, split=True),)),
    ("attention_dkv", "pointers256", ("sm_100",), _c((64, 64, 8, 1))),
    *((f"attention_{kernel}", "fp32_64", _ALL, _c((32, 32, 8, 1))) for kernel in ("forward", "dq", "dkv")),
    *((f"attention_{kernel}", "fp32_128", _ALL, _c((32, 32, 8, 1))) for kernel in ("forward", "dkv")),
    ("attention_dq", "fp32_128", _ALL, _c((16, 16, 8, 1))),
    *((f"attention_{kernel}", "fp32_256", _ALL, _c((16, 16, 8, 1))) for kernel in ("forward", "dq", "dkv")),
    # Bound by memory, at full width everywhere: nothing is left to tune. Of rms_norm a class is a row's length, rounded
    # up to a power of two; a program holds whole rows, at least 2,048 numbers, and a warp at most 512 where it can.
    *(("rms_norm", str(n), _EVERY, _c((max(1, 2048 // n), n, min(16, max(4, n // 512)), 3))) for n in _POWERS),
    ("add_rms_norm", "lora", _EVERY, _c((16, 128, 4, 2))),
    ("rope", "heads", _EVERY, _c((32, 0, 4, 3))),  # heads of one token; fewer warps where there are fewer numbers
    ("rope", "lora", _EVERY, _c((64, 0, 8, 3))),  # tokens of one head: the fewest that use an H100's tensor cores
    ("gated", "rows", _EVERY, _c((1, 2048, 4, 3))),  # 128-bit accesses for 128 threads, or AMD's 256
    ("gated", "lora", _EVERY, _c((64, 64, 8, 3))),  # four warps take twice the registers
    ("cross_entropy", "columns", _EVERY, _c((1, 4096, 8, 3))),  # 64 registers on sm_90; 8,192 columns take 127
    ("lora_linear", "few_rows", _EVERY, _c((64, 32, 4, 4))),  # narrow, so that all processors stream rows of W
    ("lora_linear", "few_rows_nf4", _EVERY, _c((64, 32, 4, 3))),
    ("nf4_dequantize", "bytes", _EVERY, _c((1, 4096, 4, 3))),  # a wide load or two for each of 128 threads
)
_CONFIGS = {(kernel, shape, arch): configs for kernel, shape, archs, configs in _ROWS for arch in archs}


def default_config(kernel: str, shape: str, arch: str) -> LaunchConfig:
    """The table's row for an architecture or for the nearest one known. Raises: KeyError for an unknown kernel."""
    return candidates(kernel, shape, arch)[0]


def config_for(kernel: str, shape: str, x: Tensor) -> LaunchConfig:
    """The table's row for the device of x."""
    return default_config(kernel, shape, architecture(x.device))


def candidates(kernel: str, shape: str, arch: str) -> tuple[LaunchConfig, ...]:
    """The default configuration and what tuning tries besides it; the static gate compiles all of them."""
    if arch == INTERPRETER:
        return _CONFIGS.get((kernel, shape, arch), (_INTERPRETED,))
    arch = _nearest(arch)
    return _CONFIGS.get((kernel, shape, arch)) or _CONFIGS[kernel, shape.removesuffix("_softcap"), arch]


def _nearest(arch: str) -> str:
    """An architecture of the table whose shared memory and instructions `arch` has too."""
    if arch in _ALL:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    return "sm_100" if arch in ("sm_101", "sm_103") else "sm_86"


def choose_config(
    kernel: str, shape: str, device: torch.device, launch: Callable[[LaunchConfig], None]
) -> LaunchConfig:
    """The configuration to launch with: the table's, or with LLAMAHOME_AUTOTUNE=1 on a GPU the fastest of its row.

    Candidates are timed once per kernel, shape class and architecture; Triton's cache folder keeps the winner.
    `launch` runs the kernel with one configuration; it is called several times, so it must not change its inputs.
    """
    arch = architecture(device)
    configs = candidates(kernel, shape, arch)
    if len(configs) == 1 or device.type == "cpu" or os.environ.get("LLAMAHOME_AUTOTUNE") != "1":
        return configs[0]
    key = f"{kernel}-{shape}-{arch}"
    known = _tuned(key)
    if known is None:
        known = _fastest(configs, launch)
        _remember(key, known)
    return known


@functools.cache
def _tuned(key: str) -> LaunchConfig | None:
    try:
        return LaunchConfig(**json.loads(_tuning_file(key).read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # not tuned yet, or by a version with other fields
        return None


def _remember(key: str, config: LaunchConfig) -> None:
    path = _tuning_file(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, config._asdict())
    _tuned.cache_clear()


def _tuning_file(key: str) -> Path:
    import triton

    return Path(triton.knobs.cache.dir) / "llamahome" / f"{key}-triton{triton.__version__}.json"


def _fastest(configs: Sequence[LaunchConfig], launch: Callable[[LaunchConfig], None]) -> LaunchConfig:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def milliseconds(config: LaunchConfig) -> float:
        try:
            return float(do_bench(lambda: launch(config), warmup=5, rep=20))
        except OutOfResources:
            return float("inf")

    return min(configs, key=milliseconds)
