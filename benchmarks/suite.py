"""The engine's parts beside fixed references in the same process, as ratios that hold on a busy machine.

    python benchmarks/suite.py                    # a table
    python benchmarks/suite.py --check            # what `make bench` does: fail beyond benchmarks/budgets.json

`<part>_speed` is the reference's processor time by ours on one thread (median of pairs taken in turn), `<part>_memory`
our peak of live tensor bytes by the reference's. The reader's ratios come from `reader.py`. A budget is a bound on a
ratio: `min` or `max`; under `avx512_bf16` are those of processors with these instructions. With --check a ratio beyond
its bound is one line on stderr, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from suite_cases import CASES, Sides

from llamahome import _C
from llamahome.memory.tracer import PeakTracker

# One thread, and its processor time: other load on the machine then counts for little.
torch.set_num_threads(1)
HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.json"
READER_KEYS = ("ratio_torch_loop", "private_mb")


def seconds(run: Callable[[], Any]) -> float:
    """Of this thread on a processor."""
    begin = time.thread_time()
    run()
    return time.thread_time() - begin


def speed(sides: Sides, pairs: int) -> float:
    """The reference's time by ours: the median over pairs, after one that warms both up."""
    ratios = [seconds(sides.reference) / seconds(sides.ours) for _ in range(pairs + 1)]
    return statistics.median(ratios[1:])


def peak(run: Callable[[], Any]) -> int:
    """Most bytes of live tensors that a call makes, beyond those that are there before it."""
    gc.collect()
    tracker = PeakTracker()
    tracker.count(x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
    before = tracker.live_bytes
    with tracker:
        run()
    return tracker.peak_bytes - before


def measure(names: list[str], pairs: int) -> dict[str, float]:
    ratios = {}
    for name in names:
        torch.manual_seed(0)
        sides = CASES[name]()
        ratios[f"{name}_speed"] = speed(sides, pairs)
        ratios[f"{name}_memory"] = peak(sides.ours) / (sides.content or peak(sides.reference))
    return ratios


def reader() -> dict[str, float]:
    command = [sys.executable, HERE / "reader.py", "--quick", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    return {f"reader_{key}": figures[key] for key in READER_KEYS}


def bounds_here(budgets: dict[str, Any], avx512_bf16: bool) -> dict[str, dict[str, float]]:
    """The bounds of this processor."""
    found = {}
    for name, bounds in budgets.items():
        common = {side: bound for side, bound in bounds.items() if side != "avx512_bf16"}
        found[name] = common | (bounds.get("avx512_bf16", {}) if avx512_bf16 else {})
    return found


def beyond(ratios: dict[str, float], budgets: dict[str, dict[str, float]]) -> list[str]:
    """One line per ratio out of its bounds, and per budget of which there is no ratio."""
    faults = []
    for name, bounds in budgets.items():
        value = ratios.get(name)
        if value is None:
            faults.append(f"{name}: has a budget and was not measured")
        elif value < bounds.get("min", value):
            faults.append(f"{name}: {value:.3f} is below {bounds['min']}")
        elif value > bounds.get("max", value):
            faults.append(f"{name}: {value:.3f} is above {bounds['max']}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a ratio is beyond its budget")
    parser.add_argument("--budgets", type=Path, default=BUDGETS)
    parser.add_argument("--only", action="append", choices=[*CASES, "reader"], help="one part [all]")
    parser.add_argument("--quick", action="store_true", help="5 pairs of each instead of 15")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    chosen = args.only or [*CASES, "reader"]
    ratios = measure([name for name in chosen if name in CASES], 5 if args.quick else 15)
    if "reader" in chosen:
        ratios |= reader()
    budgets = bounds_here(json.loads(args.budgets.read_text("utf-8")), _C.has_avx512_bf16())
    if args.only:
        budgets = {name: bounds for name, bounds in budgets.items() if name.startswith(tuple(args.only))}
    if not args.json:
        for name, value in ratios.items():
            bounds = "  ".join(f"{side} {bound}" for side, bound in budgets.get(name, {}).items())
            print(f"{name:28} {value:8.3f}  {bounds}")
    faults = beyond(ratios, budgets) if args.check else []
    for fault in faults:
        print(fault, file=sys.stderr)
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()} | {"faults": len(faults)}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
