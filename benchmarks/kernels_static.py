"""Compile every kernel for every GPU it is meant for, without a GPU, and hold the machine code to limits.

    python benchmarks/kernels_static.py              # what `make kernels` does
    python benchmarks/kernels_static.py --update     # accept today's figures as the golden ones
    python benchmarks/kernels_static.py --table      # print them as a Markdown table

A row is a case of some `kernels/*_triton.py` on one architecture. It must be launchable, not spill in its hot loop, use
the architecture's tensor cores for its dots and 128-bit accesses for its tensors, compute nothing in double precision
even if a scalar comes as fp64, and stay within 10 % of the golden figures. Rows are compiled once, by two processes,
and kept under `build/` by the content they depend on. One line per fault on stderr; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import static_report

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "kernels" / "static_golden.json"
CACHE = ROOT / "build" / "kernels_static"
COMPARED = ("registers", "spill_bytes", "shared_bytes", "instructions")
SHOWN = ("registers", "spill_bytes", "shared_bytes", "instructions", "tensor_core", "wide_share")
GROWTH = 1.10
SPILL_BUDGET = {"sm_90": 0, "sm_100": 0}
OTHER_SPILL_BUDGET = 256  # bytes, outside the hot loop
# Rules that a case need not keep, and why.
EXEMPT = {("token_bounds", "wide loads"): "a bisection: each lane reads where its own search stands"} | {
    (f"add_rms_norm lora {rank}", "tensor cores"): "16 rows are too few for an H100's; the row's bytes are the bound"
    for rank in (16, 64)
}

Figures = dict[str, int]


class Row(NamedTuple):
    figures: Figures
    seconds: float
    error: str = ""


def load_cases(path: Path) -> dict[str, Any]:
    """The cases of a kernel file by name; none where it has no `static_cases`."""
    inside = path.parent == ROOT / "kernels"
    name = f"llamahome.kernels.{path.stem}" if inside else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    cases = module.static_cases() if hasattr(module, "static_cases") else ()
    return {case.name: case for case in cases}


def measure(path: Path, case_name: str, arch: str) -> Row:
    """One row, from the cache where nothing that it depends on has changed."""
    begin = time.perf_counter()
    case = load_cases(path)[case_name]
    key = hashlib.sha256(static_report.content_key(case, arch).encode()).hexdigest()
    kept = CACHE / f"{key}.json"
    if kept.exists():
        return Row(json.loads(kept.read_text("utf-8")), time.perf_counter() - begin)
    try:
        figures = static_report.report(case, arch)
    except Exception as error:  # of the compiler, any class: reported with the other rows' faults
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Row({}, time.perf_counter() - begin, f"does not compile: {lines[-1]}")
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(figures), "utf-8")
    partial.replace(kept)
    return Row(figures, time.perf_counter() - begin)


def measure_all(paths: list[Path], processes: int) -> dict[str, Row]:
    """Every row by name, compiled in processes of their own."""
    jobs = [(path, case.name, arch) for path in paths for case in load_cases(path).values() for arch in case.archs]
    names = [f"{name.removesuffix(f'_{arch}')} {arch}" for _, name, arch in jobs]
    assert len(set(names)) == len(names), "two cases have one name"
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return dict(zip(names, pool.map(measure, *zip(*jobs, strict=True)), strict=True))


def broken_rules(name: str, figures: Figures) -> Iterator[str]:
    """One line for each limit that a row does not keep."""
    case, arch = name.rsplit(" ", 1)
    budget = SPILL_BUDGET.get(arch, OTHER_SPILL_BUDGET)
    shared, registers, spilled = (figures[x] for x in ("shared_bytes", "registers", "spill_bytes"))
    rules = {
        "launch": (figures["launchable"], f"cannot launch: {shared} bytes of shared memory, {registers} registers"),
        "hot loop": (not figures["loop_spills"], f"{figures['loop_spills']} spill instructions in the hot loop"),
        "spills": (spilled <= budget, f"{spilled} bytes spilled, budget {budget}"),
        "double": (not figures["double"], f"{figures['double']} double-precision instructions"),
        "fp64 scalar": (not figures["fp64_arithmetic"], "computes in double precision with an fp64 scalar; tl.cast it"),
        "tensor cores": (_uses_tensor_cores(arch, figures), "its dots do not use the architecture's tensor cores"),
        "wide loads": (figures["wide_loads"], "no 128-bit load from global memory"),
        "wide stores": (figures["wide_stores"] or arch == "gfx942", "no 128-bit store to global memory"),
    }
    for rule, (kept, message) in rules.items():
        if not kept and (case, rule) not in EXEMPT:
            yield f"{name}: {message}"


def _uses_tensor_cores(arch: str, figures: Figures) -> bool:
    if not figures["dots"]:
        return True
    if arch == "gfx942":
        return figures["mfma"] > 0
    if arch == "sm_90":
        return figures["hgmma"] > 0 and not figures["hmma"]
    return figures["utcmma" if arch == "sm_100" else "hmma"] > 0


def regressions(rows: dict[str, Figures], golden: dict[str, Figures]) -> Iterator[str]:
    """One line for each figure that grew by more than 10 %, and for each row that only one side has."""
    for name in sorted(rows.keys() | golden.keys()):
        if name not in golden:
            yield f"{name}: has no golden figures; run make kernels ARGS=--update"
        elif name not in rows:
            yield f"{name}: is gone, its golden figures are not; run make kernels ARGS=--update"
        else:
            pairs = ((figure, golden[name][figure], rows[name][figure]) for figure in COMPARED)
            yield from (f"{name}: {figure} {old} -> {new}" for figure, old, new in pairs if new > old * GROWTH)


def shown(figures: Figures) -> Figures:
    """What the golden file and the table hold of a row."""
    accesses = [figures[f"{width}_{kind}"] for width in ("wide", "narrow") for kind in ("loads", "stores")]
    tensor_core = sum(figures.get(name, 0) for name in ("hmma", "hgmma", "utcmma", "mfma"))
    extra = {"tensor_core": tensor_core, "wide_share": round(100 * sum(accesses[:2]) / max(1, sum(accesses)))}
    return {name: (figures | extra)[name] for name in SHOWN}


def table(rows: dict[str, Figures]) -> str:
    heads = ["kernel", "GPU", "registers", "spilled, B", "shared, B", "instructions", "tensor-core", "wide accesses, %"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * len(SHOWN)]
    for name, figures in rows.items():
        lines.append("| " + " | ".join([*name.rsplit(" ", 1), *(str(figures[figure]) for figure in SHOWN)]) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="kernel files [kernels/*_triton.py]")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="the golden figures' file")
    parser.add_argument("--update", action="store_true", help="write today's figures into it")
    parser.add_argument("--table", action="store_true", help="print the golden figures as Markdown and end")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    return parser.parse_args()


def check(rows: dict[str, Row], golden: Path, update: bool) -> list[str]:
    """All faults, one line each; with `update` the golden file is written instead of compared."""
    figures = {name: row.figures for name, row in rows.items() if not row.error}
    faults = [f"{name}: {row.error}" for name, row in rows.items() if row.error]
    faults += [fault for name, row in figures.items() for fault in broken_rules(name, row)]
    versions = {"triton": static_report.triton.__version__}
    if update:
        content = versions | {"rows": {name: shown(row) for name, row in sorted(figures.items())}}
        golden.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        return faults
    stored = json.loads(golden.read_text("utf-8"))
    if stored["triton"] != versions["triton"]:
        return [*faults, f"golden figures are of triton {stored['triton']}, this is {versions['triton']}; "
                "run make kernels ARGS=--update"]  # fmt: skip
    failed = {name for name, row in rows.items() if row.error}
    return faults + list(regressions(figures, {k: v for k, v in stored["rows"].items() if k not in failed}))


def main() -> int:
    args = arguments()
    if args.table:
        print(table(json.loads(args.golden.read_text("utf-8"))["rows"]))
        return 0
    begin = time.perf_counter()
    static_report.compile_only()
    paths = [path.resolve() for path in args.files] or sorted((ROOT / "kernels").glob("*_triton.py"))
    rows = measure_all(paths, args.processes)
    faults = check(rows, args.golden, args.update)
    if not args.json:
        for name, row in rows.items():
            values = "  ".join(f"{figure} {row.figures.get(figure, '-')}" for figure in COMPARED)
            print(f"{name:40} {row.seconds:6.1f} s  {values}")
    for fault in faults:
        print(fault, file=sys.stderr)
    print(json.dumps({"rows": len(rows), "faults": len(faults), "seconds": round(time.perf_counter() - begin, 1)}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
