"""Every kernel on a GPU: against float64, and timed beside what else computes the same. Under eight minutes.

    python benchmarks/gpu.py             # needs a GPU
    python benchmarks/gpu.py --quick     # one model size, fewer repetitions: about two minutes
    python benchmarks/gpu.py --dry-run   # the same code at tiny sizes on a CPU: nothing it times means anything

First a table of kernels: largest relative error of outputs and gradients beside that of plain PyTorch in the same
precision (bf16), milliseconds forward and forward with backward, and peak memory. Rivals are plain PyTorch, SDPA,
torch's varlen_attn, and flash-attn and Liger where they are installed. Then whole training steps of a Llama with LoRA
(random weights, nothing is downloaded): tokens per second, MFU against this GPU's measured matrix product, and peak
memory, without and with `fuse`. Every attention, rivals too, is tried for leaks: a changed sample must leave every bit
of the others' outputs and gradients. Exit code 1: a kernel is less exact than 1.5 times plain PyTorch, or leaks. 9:
there is no GPU.

The clock is watched: kernels may take five and a half minutes, compiling included, and what then is left of them is
named as left out; whole steps have the rest, and each of them starts only before seven minutes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gpu_model
import torch
from gpu_kernels import SAMPLES, SHAPES, TINY, Case, Operation, Shape, cases
from torch import Tensor

from llamahome.monitor.tracker import measure_matmul_peak

CHECK_TOKENS = 512
MODEL_LAYERS = 16
LIMIT = 1.5  # our error by plain PyTorch's
FLOOR = 1e-5  # errors below it are equal
KERNEL_SECONDS, LAST_START = 330, 420  # of eight minutes: kernels end, and the last whole step starts

LEFT_OUT = "left out: no time"

Row = dict[str, Any]


def gradients(operation: Operation, tensors: dict[str, Tensor], frozen: tuple[str, ...]) -> list[Tensor]:
    """Outputs and the gradients of all floating inputs but the frozen ones, for one fixed gradient of each output."""
    leaves = {
        name: x.detach().requires_grad_(x.is_floating_point() and name not in frozen) for name, x in tensors.items()
    }
    outputs = operation(**leaves)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    if not outputs[0].requires_grad:
        return outputs
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    given = [torch.randn(y.shape, device=y.device, generator=generator).to(y.dtype) for y in outputs]
    found = torch.autograd.grad(outputs, [x for x in leaves.values() if x.requires_grad], given)
    return [*(y.detach() for y in outputs), *found]


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))


def errors(case: Case, tokens: int) -> tuple[float, float]:
    """Largest relative error against float64 of ours and of plain PyTorch, both in bf16."""
    tensors = case.inputs(tokens)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    with torch.set_grad_enabled(not case.forward_only):
        exact = gradients(case.reference, wide, case.frozen)
        ours, plain = (gradients(operation, tensors, case.frozen) for operation in (case.ours, case.reference))
    return relative_error(ours, exact), relative_error(plain, exact)


def leaks(case: Case, operation: Operation, tokens: int) -> bool:
    """Whether changing the second sample changes a bit of another's output or gradients."""
    tensors = case.inputs(tokens)
    own = slice(tokens // SAMPLES, 2 * (tokens // SAMPLES))
    changed = {name: x.clone() for name, x in tensors.items()}
    for x in changed.values():
        x[own] = 1 - 2 * x[own]
    results = [gradients(operation, inputs, case.frozen) for inputs in (tensors, changed)]
    pairs = list(zip(*results, strict=True))
    return any(
        not torch.equal(one[rows], other[rows])
        for one, other in pairs
        for rows in (slice(0, own.start), slice(own.stop, None))
    )


def milliseconds(run: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Median of one call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=25, rep=repetitions, return_mode="median"))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Allocated on the device beyond what was there; 0 on a CPU."""
    if device.type != "cuda":
        run()
        return 0
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def measured(case: Case, operation: Operation, tokens: int, device: torch.device, repetitions: int) -> Row:
    """Times and memory of one operation, or why it has none: a rival may be too large or refuse."""
    try:
        tensors = case.inputs(tokens)
        with torch.no_grad():
            forward = milliseconds(lambda: operation(**tensors), device, repetitions)
        if case.forward_only:
            return {"forward_ms": forward}
        if case.isolated and leaks(case, operation, tokens):
            return {"leaks": True}
        both = milliseconds(lambda: gradients(operation, tensors, case.frozen), device, repetitions)
        peak = peak_bytes(lambda: gradients(operation, tensors, case.frozen), device)
    except Exception as error:  # a rival's own, of any class; reported in the table
        if operation is case.ours:
            raise
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"}
    return {"forward_ms": forward, "both_ms": both, "peak_mb": peak / 2**20}


def kernel_rows(shape: Shape, device: torch.device, repetitions: int, until: float) -> list[Row]:
    """Rows of every case that can start before the clock says `until`."""
    rows: list[Row] = []
    for case in cases(shape, device):
        if time.perf_counter() > until:
            rows.append({"shape": shape.name, "kernel": case.name, "operation": "ours", "failed": LEFT_OUT})
            continue
        ours, plain = errors(case, min(CHECK_TOKENS, shape.tokens))
        operations = {"ours": case.ours, "eager": case.reference, **case.rivals}
        for name, operation in operations.items():
            row = {"shape": shape.name, "kernel": case.name, "operation": name}
            row |= {"ours": {"error": ours}, "eager": {"error": plain}}.get(name, {})
            rows.append(row | measured(case, operation, shape.tokens, device, repetitions))
    return rows


def model_rows(shape: Shape, layers: int, device: torch.device, steps: int, until: float) -> list[Row]:
    peak_flops = measure_matmul_peak("bf16", device.type)
    rows: list[Row] = []
    for name, model, loss in gpu_model.variants(shape, layers, device):
        row: Row = {"shape": f"{shape.name}, {layers} layers", "kernel": "training step", "operation": name}
        trained = shape.tokens - gpu_model.SAMPLES
        if time.perf_counter() > until:
            rows.append(row | {"failed": LEFT_OUT})
            continue
        try:
            seconds = gpu_model.step_seconds(model, loss, device, steps)
            peak = peak_bytes(lambda m=model, f=loss: gpu_model.step_seconds(m, f, device, 1), device)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            rows.append(row | {"failed": "out of memory"})
            continue
        mfu = gpu_model.flops_of(model, shape).of(shape.tokens, trained) / seconds / peak_flops
        rows.append(row | {"tokens_per_s": shape.tokens / seconds, "mfu": mfu, "peak_mb": peak / 2**20})
    return rows


def print_table(rows: list[Row], columns: tuple[str, ...]) -> None:
    heads = ("shape", "kernel", "operation", *columns)
    lines = [heads, *(tuple(cell(row, column) for column in heads) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line, row in zip(lines, [{}, *rows], strict=True):
        text = "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True))
        print(text.rstrip() + (f"  {row['failed']}" if "failed" in row else "  leaks" if "leaks" in row else ""))


def cell(row: Row, column: str) -> str:
    value = row.get(column, "")
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if column == "error" else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def inexact(rows: list[Row]) -> list[str]:
    """Kernels whose error is beyond what bf16 explains, and attention of ours that leaks."""
    faults = [
        f"{row['shape']}, {row['kernel']}: leaks" for row in rows if row["operation"] == "ours" and "leaks" in row
    ]
    for ours, plain in itertools.pairwise(rows):
        if (
            "error" in ours
            and "error" in plain
            and ours["operation"] == "ours"
            and ours["error"] > max(LIMIT * plain["error"], FLOOR)
        ):
            place = f"{ours['shape']}, {ours['kernel']}"
            faults.append(f"{place}: relative error {ours['error']:.1e}, plain PyTorch's {plain['error']:.1e}")
    return faults


def flat(rows: list[Row]) -> dict[str, float]:
    """One number per key, as `shape/kernel/operation/figure`."""
    named = ("shape", "kernel", "operation")
    return {
        "/".join([*(row[part] for part in named), figure]): value
        for row in rows
        for figure, value in row.items()
        if isinstance(value, float)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smaller model's sizes only, fewer repetitions")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, to try this script")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("error: no GPU; this benchmark needs one; --dry-run tries it on a CPU", file=sys.stderr)
        return 9
    torch.manual_seed(0)
    device = torch.device("cpu" if args.dry_run else "cuda")
    shapes = (TINY,) if args.dry_run else SHAPES[1:] if args.quick else SHAPES
    layers, steps = (2, 1) if args.dry_run else (4, 3) if args.quick else (MODEL_LAYERS, 5)
    begin = time.perf_counter()
    repetitions = 30 if args.quick else 100
    kernels = [row for shape in shapes for row in kernel_rows(shape, device, repetitions, begin + KERNEL_SECONDS)]
    models = model_rows(shapes[-1], layers, device, steps, begin + LAST_START)
    if not args.json:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "dry run on a CPU: no time means anything"
        print(f"{name}, torch {torch.__version__}")
        print_table(kernels, ("error", "forward_ms", "both_ms", "peak_mb"))
        print()
        print_table(models, ("tokens_per_s", "mfu", "peak_mb"))
    faults = inexact(kernels)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    figures = flat(kernels + models)
    print(json.dumps(figures | {"inexact": len(faults), "seconds": time.perf_counter() - begin}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
