"""What one Triton kernel becomes for one GPU, found without any GPU: registers, spills, shared memory, instructions.

Triton compiles for a target that is not there; the assembler's log gives registers and spills, the disassembler (both
come with Triton's wheel) the instructions. Figures are whole numbers, so that they can be compared exactly.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend

WARP = 32
WIDE = r"[A-Z0-9.]*\.(?:128|256)\b"
TENSOR = r"\b(?:HMMA|HGMMA|QGMMA|IMMA|UTC[A-Z]*MMA)\b"
GLOBAL_READ = r"\b(?:LDG|LDGSTS|UTMALDG)\b"
SPILL = r"\b(?:LDL|STL)\b"
SASS = {
    "hmma": r"\bHMMA\b",
    "hgmma": r"\bHGMMA\b",
    "utcmma": r"\bUTC[A-Z]*MMA\b",
    "wide_loads": rf"\b(?:LDG|LDGSTS){WIDE}|\bUTMALDG\b",
    "narrow_loads": rf"\b(?:LDG|LDGSTS)\b(?!{WIDE})",
    "wide_stores": rf"\bSTG{WIDE}|\bUTMASTG\b",
    "narrow_stores": rf"\bSTG\b(?!{WIDE})",
    "double": r"\bD(?:FMA|MUL|ADD|SETP)\b",
}
AMD = {
    "mfma": r"^\s+v_mfma",
    "wide_loads": r"^\s+(?:global|buffer)_load_dwordx4",
    "narrow_loads": r"^\s+(?:global|buffer)_load_(?!dwordx4)",
    "wide_stores": r"^\s+(?:global|buffer)_store_dwordx4",
    "narrow_stores": r"^\s+(?:global|buffer)_store_(?!dwordx4)",
    "double": r"^\s+v_(?:fma|mul|add)_f64",
}


class Limits(NamedTuple):
    """Of one block of threads: shared memory in bytes, registers of all its threads, tensor memory columns."""

    shared_bytes: int
    registers: int = 65536
    tensor_columns: int = 512


# CUDA C++ Programming Guide, table of compute capabilities; CDNA3 instruction set: 64 KiB of LDS, 512 registers a lane.
LIMITS = {
    "sm_80": Limits(166912),
    "sm_86": Limits(101376),
    "sm_89": Limits(101376),
    "sm_90": Limits(232448),
    "sm_100": Limits(232448),
    "gfx942": Limits(65536),
}
AMD_REGISTERS = 512  # of a lane, vector and accumulation registers together


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), WARP) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def report(case: Any, arch: str) -> dict[str, int]:
    """Figures of a `StaticCase` on `arch`; `fp64_arithmetic` counts operations that an fp64 scalar brings in."""
    compiled, log = _compile(case, arch)
    figures = _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled, log)
    figures["shared_bytes"] = compiled.metadata.shared
    figures["dots"] = len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"]))
    figures["launchable"] = int(_launchable(figures, compiled.metadata, LIMITS[arch]))
    figures["fp64_arithmetic"] = _fp64_arithmetic(case, arch)
    return figures


def jit_function(kernel: Any) -> Any:
    """The kernel below its autotuner and heuristics."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    return kernel


def _source(case: Any, arch: str, scalar: str = "fp32") -> ASTSource:
    """As a launch specialises it. Pointers and whole numbers count as multiples of 16; `i32:1` is one that is not."""
    function = jit_function(case.kernel)
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in case.constexprs:
            signature[name] = "constexpr"
            continue
        kind, _, multiple = case.signature[name].partition(":")
        signature[name] = scalar if kind == "fp32" else kind
        if kind.startswith(("*", "i")) and multiple != "1":
            attributes[(position,)] = [["tt.divisibility", int(multiple or 16)]]
        if kind.startswith("*") and arch.startswith("gfx"):
            attributes[(position,)].append(["tt.pointer_range", 32])
    return ASTSource(function, signature, case.constexprs, attributes)


def _options(case: Any) -> dict[str, Any]:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}


def _compile(case: Any, arch: str) -> tuple[Any, str]:
    """The compiled kernel and the assembler's log."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(_source(case, arch), target=target_of(arch), options=_options(case))
    return compiled, log.getvalue()


def _fp64_arithmetic(case: Any, arch: str) -> int:
    """Double-precision operations when a float scalar comes as fp64, as torch.compile passes it."""
    if "fp32" not in case.signature.values():
        return 0
    from triton._C.libtriton import ir

    target = target_of(arch)
    backend = make_backend(target)
    options = backend.parse_options(_options(case))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    source = _source(case, arch, scalar="fp64")
    backend.add_stages(stages, options, source.language)
    try:
        module = source.make_ir(
            target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
    except triton.CompilationError:  # a loop's variable changes its type: the scalar is not cast
        return 1
    text = str(stages["ttir"](module, {}))
    return sum(bool(re.search(r"\bf64\b", line)) for line in text.splitlines() if not _harmless(line))


def _harmless(line: str) -> bool:
    return "tt.func" in line or "arith.truncf" in line or "loc(" in line.split("=")[0]


def _nvidia(compiled: Any, log: str) -> dict[str, int]:
    lines = _disassemble(compiled.asm["cubin"])
    code = "\n".join(lines)
    figures = {name: len(re.findall(pattern, code)) for name, pattern in SASS.items()}
    figures["registers"] = max(_numbers(r"Used (\d+) registers", log))
    figures["spill_bytes"] = sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", log))
    figures["loop_spills"] = sum(_count(SPILL, body) for body in hot_loops(lines))
    figures["instructions"] = sum(";" in line for line in lines)
    return figures


def _amd(compiled: Any) -> dict[str, int]:
    code = compiled.asm["amdgcn"]
    figures = {name: len(re.findall(pattern, code, re.MULTILINE)) for name, pattern in AMD.items()}
    vector, accumulation, spills = (
        max(_numbers(rf"\.{name}:\s+(\d+)", code), default=0)
        for name in ("vgpr_count", "agpr_count", "vgpr_spill_count")
    )
    figures["registers"] = max(vector, accumulation)  # .vgpr_count already holds both on CDNA3
    figures["spill_bytes"] = 4 * spills
    figures["loop_spills"] = 0 if not spills else len(re.findall(r"^\s+scratch_(?:load|store)", code, re.MULTILINE))
    figures["instructions"] = len(re.findall(r"^\t[a-z]\w*_", code, re.MULTILINE))
    return figures


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text)]


def _count(pattern: str, lines: list[str]) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def _disassemble(cubin: bytes) -> list[str]:
    """Instructions and labels, one a line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        run = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", path], capture_output=True, text=True, check=True)
    return [line for line in run.stdout.splitlines() if "/*" in line or line.startswith(".L")]


def hot_loops(lines: list[str]) -> Iterator[list[str]]:
    """Innermost loops that do the kernel's work: tensor-core instructions, or global reads where it has none.

    A loop is the code between a label and a later branch to it. Code behind EXIT is out of line, not a loop.
    """
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L")}
    spans = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*(\.L[\w.]+)", line)
        start = labels.get(branch.group(1), i) if branch else i
        if start < i and not _count(r"\bEXIT\b", lines[start:i]):
            spans.append((start, i))
    for pattern in (TENSOR, GLOBAL_READ):
        working = [(a, b) for a, b in spans if _count(pattern, lines[a:b])]
        if working:
            break
    for a, b in working:
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in working):
            yield lines[a:b]


def _launchable(figures: dict[str, int], metadata: Any, limits: Limits) -> bool:
    if metadata.target.backend == "hip":
        fits = figures["registers"] <= AMD_REGISTERS
    else:
        per_warp = -(-figures["registers"] * WARP // 256) * 256  # registers are handed out 256 to a warp
        fits = per_warp * metadata.num_warps <= limits.registers
    tensor_columns = getattr(metadata, "tmem_size", 0) or 0
    return fits and figures["shared_bytes"] <= limits.shared_bytes and tensor_columns <= limits.tensor_columns


def content_key(case: Any, arch: str) -> str:
    """All that the figures depend on, as text."""
    own = Path(__file__).read_text("utf-8")
    source = _source(case, arch)
    parts = (triton.__version__, arch, source.hash(), source.attrs, _options(case), own)
    return "\n".join(map(str, parts))


def compile_only() -> None:
    """Compile even where the interpreter is asked for. Call before kernels are imported; children obey too."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns that its default will change
