"""The memory contract on a real model: how near the plan is, and whether runs under real limits finish within them.

    python benchmarks/governor.py                 # SmolLM2-135M and a tiny model: 12 plans, limits, a competitor, speed
    python benchmarks/governor.py --plans         # only the plans; --model tiny: only that model's
    python benchmarks/governor.py --limits        # only the limits; --limits 0.8 3: only these shares of the minimum
    python benchmarks/governor.py --beside        # only one limit, beside a process that takes and frees memory
    python benchmarks/governor.py --speed         # only the speed with twice the minimum
    python benchmarks/governor.py --quick         # two plans and one limit, about a minute on two free cores

Each measurement is a process of its own. The last line of stdout is a JSON object: `plan_error_max` (largest
|planned / measured - 1| of the peaks), `runs` (under a limit), `kills` (ended by the kernel or by an error),
`peak_over_limit` (highest peak by its limit), `too_small_exit` and `too_small_seconds` (with 0.8 of the minimum),
`limit_used` (peak by a limit of twice the minimum) and `throughput_share` (its tokens per second by those of the best
fixed batch size that runs under the same limit; steps of each in turn, medians). Limits are RLIMIT_DATA, so nothing is
mocked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ("the", "sea", "mill", "river", "stone", "fox", "train", "rain", "home", "station", "dog", "late", "dark")
CHECKPOINTED = {"processing.gradient_checkpointing": True}
FULL, FP32 = {"training.method": "full"}, {"processing.precision": "fp32"}
# Model, samples per micro-batch, tokens per sample, settings.
PLANS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("smollm2", 1, 512, {}),
    ("smollm2", 4, 256, {}),
    ("smollm2", 2, 512, CHECKPOINTED),
    ("smollm2", 2, 256, {"processing.gradient_checkpointing": "mlp"}),
    ("smollm2", 1, 256, FP32),
    ("smollm2", 2, 256, FP32 | CHECKPOINTED),
    ("smollm2", 1, 256, FULL),
    ("smollm2", 1, 256, FULL | FP32 | CHECKPOINTED),
    ("tiny", 4, 512, {}),
    ("tiny", 8, 256, FP32),
    ("tiny", 4, 512, FULL),
    ("tiny", 8, 512, FULL | CHECKPOINTED),
]
LIMITS = (1.15, 1.5, 3.0, 0.8)  # of the smallest limit that the plan allows
LENGTH = 256  # tokens of each sample under a limit
FIXED = (2, 4, 8, 12)  # batch sizes that the governor's is compared with, of steps of 12 samples
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", action="store_true", help="only compare plans with peaks")
    parser.add_argument("--limits", type=float, nargs="*", metavar="SHARE", help="only run under limits")
    parser.add_argument("--beside", action="store_true", help="only run beside another process")
    parser.add_argument("--speed", action="store_true", help="only measure the speed that a limit costs")
    parser.add_argument("--model", choices=("smollm2", "tiny"), help="plans of one model")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    say = (lambda *_: None) if args.json else print
    everything = not (args.plans or args.limits is not None or args.beside or args.speed)
    figures: dict[str, Any] = dict.fromkeys(("plan_error_max", "runs", "kills", "peak_over_limit", "throughput_share"))
    if args.plans or everything:
        cases = PLANS[:1] + PLANS[8:9] if args.quick else PLANS
        figures |= compare_plans([case for case in cases if args.model in (None, case[0])], say)
    if args.limits is not None or args.beside or everything:
        shares = (LIMITS[1], LIMITS[3]) if args.quick else LIMITS
        cases = [(share, False) for share in (args.limits or shares) if everything or args.limits is not None]
        cases += [(1.5, True)] if args.beside or (everything and not args.quick) else []
        figures |= run_under_limits(cases, say)
    if args.speed or (everything and not args.quick):
        figures |= compare_speed(say)
    print(json.dumps(figures))


def compare_plans(cases: list[tuple[str, int, int, dict[str, Any]]], say: Any) -> dict[str, Any]:
    """Peak of each case's steps against its plan."""
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_model(Path(folder)) if any(model == "tiny" for model, *_ in cases) else ""
        for model, samples, length, settings in cases:
            name = tiny if model == "tiny" else model
            found = spawn({"model": name, "samples": samples, "length": length, "settings": settings})
            if "error" in found:
                say(f"{model} {samples} x {length} {settings}: {found['error']}")
                continue
            errors.append(found["planned"] / found["peak"] - 1)
            say(f"{model} {samples} x {length} {settings}: planned {found['planned'] / 1e6:.0f} MB, measured "
                f"{found['peak'] / 1e6:.0f} MB ({errors[-1]:+.1%}); slack {found['slack']:.2f}")  # fmt: skip
    return {"plan_error_max": max(map(abs, errors)), "plans": len(errors)}


def run_under_limits(cases: list[tuple[float, bool]], say: Any) -> dict[str, Any]:
    """Runs under RLIMIT_DATA: shares of the minimum, and whether another process takes and frees memory beside it."""
    case = {"model": "smollm2", "samples": 0, "length": LENGTH, "settings": {}, "steps": 3, "global": 4}
    minimum = spawn({**case, "steps": 0})["minimum"]
    figures: dict[str, Any] = {"minimum": minimum, "runs": 0, "kills": 0, "peak_over_limit": 0.0}
    for share, beside in cases:
        competitor = subprocess.Popen([sys.executable, "-c", COMPETITOR]) if beside else None
        started = time.perf_counter()
        found = spawn({**case, "limit": int(share * minimum)})
        seconds = time.perf_counter() - started
        if competitor is not None:
            competitor.terminate()
            competitor.wait()
        what = f"limit {share:.2f} x {minimum / 1e6:.0f} MB{', beside another' if beside else ''}"
        how = found.get("error") or f"finished, peak {found['peak'] / 1e6:.0f} MB"
        say(f"{what}: {how}, {seconds:.0f} s")
        if share < 1:
            figures |= {"too_small_exit": found.get("code"), "too_small_seconds": seconds}
            continue
        figures["runs"] += 1
        figures["kills"] += "error" in found
        figures["peak_over_limit"] = max(figures["peak_over_limit"], found.get("peak", 0) / (share * minimum))
    return figures


def compare_speed(say: Any) -> dict[str, Any]:
    """Tokens per second under twice the minimum: the governor's cut and fixed batch sizes, step by step in turn."""
    case = {"model": "smollm2", "length": LENGTH, "samples": 0, "settings": {}, "global": max(FIXED)}
    limit = 2 * spawn({**case, "steps": 0})["minimum"]
    held = spawn({**case, "limit": limit, "steps": 4, "fixed": FIXED})
    say(f"governed: {held}")
    return {"limit_used": held["peak"] / limit, "throughput_share": held["speed"] / max(held["fixed"].values())}


COMPETITOR = """
import time
while True:
    held = bytearray(1 << 30)
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(2)
    del held
    time.sleep(2)
"""


def spawn(case: dict[str, Any]) -> dict[str, Any]:
    """What `child` returns in a process of its own, or how that ended."""
    command = [sys.executable, __file__, "--child", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"error": (done.stderr.splitlines() or ["killed"])[-1], "code": done.returncode}


def child(case: dict[str, Any]) -> dict[str, Any]:
    """Train some steps; `samples` 0 leaves the cut to the governor, `limit` is set as RLIMIT_DATA before anything."""
    if limit := case.get("limit"):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from llamahome.config import Config
    from llamahome.errors import LlamaHomeError
    from llamahome.training.calibrate import calibrate
    from llamahome.training.rundir import RunFolder
    from llamahome.training.setup import assemble

    with tempfile.TemporaryDirectory() as folder:
        samples, length = case["samples"], case["length"]
        values = {
            "data.path": str(write_rows(Path(folder, "rows.jsonl"), length)),
            "data.max_length": length,
            "data.validation_split": 0.0,
            "data.train_on": "all",
            "model.name": None if case["model"] == "smollm2" else case["model"],
            "training.output": str(Path(folder, "run")),
            "training.memory_limit": "100%",
            "training.batch_size": samples or "auto",
            "optimization.max_steps": max(1, case.get("steps", 2)),
            "optimization.global_batch_size": case.get("global", 2 * samples),
            "processing.compile_mode": "none",
            "monitor.sinks": ["none"],
            **case["settings"],
        }
        config = Config.load(None, values)
        try:
            with RunFolder(Path(config.training.output), fresh=True) as run:
                loop = assemble(config, run, None).loop
                governor = loop.governor
                assert governor is not None
                minimum = smallest(config, governor, loop.objective.causal.config.to_dict(), length)
                if case.get("steps", 2) == 0:
                    return {"minimum": minimum}
                for _ in calibrate(loop):
                    pass
                records = list(loop)
                turns = in_turn(loop, case["fixed"]) if "fixed" in case else {}
        except LlamaHomeError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        peak, late = max(record["memory_peak_bytes"] for record in records), records[len(records) // 2 :]
        plan = governor.plan.at(records[-1]["micro_batch_tokens"])
        return {
            "minimum": minimum,
            "planned": plan.total,
            "peak": peak,
            "last_peak": records[-1]["memory_peak_bytes"],
            "slack": (peak - plan.live) / (plan.activations + plan.loss),
            "tokens": records[-1]["micro_batch_tokens"],
            "speed": turns.pop(0, statistics.median(record["tokens"] / record["step_seconds"] for record in late)),
            "fixed": turns,
        }


def in_turn(loop: Any, batch_sizes: Sequence[int]) -> dict[int, float]:
    """Median tokens per second of steps with each batch size, and (0) with the governor's; what does not fit is out.

    What the governor learns in its own turns stays with it: a run forgets no failure either.
    """
    governed, speeds = loop.governor.state_dict(), {size: [] for size in (0, *batch_sizes)}
    batches, loop.state.total_steps = loop.batches, loop.state.step + ROUNDS * len(speeds)
    for _ in range(ROUNDS):
        for size in list(speeds):
            loop.governor.load_state_dict(governed)
            loop.batches = replace(batches, max_samples=size or None)
            if size:
                loop.governor.token_budget = size * LENGTH
            record = loop.run_step()
            speeds[size].append(record["tokens"] / record["step_seconds"])
            if not size:
                governed = loop.governor.state_dict()
            if size and record["micro_batch_tokens"] < size * LENGTH:
                del speeds[size]
    return {size: statistics.median(found) for size, found in speeds.items()}


def smallest(config: Any, governor: Any, architecture: dict[str, Any], length: int) -> int:
    """The smallest limit that the plan of this process allows, with every rung of the ladder."""
    from llamahome.memory.ladder import Machine, Workload, choose_plan

    work = Workload(longest=length, step_tokens=config.optimization.global_batch_size * length, tokens=0)
    precision = "fp32" if config.processing.precision == "fp32" else "bf16"
    last = choose_plan(architecture, config, Machine("cpu", 0), work, precision=precision, fused=True).smallest
    return replace(last, overhead=governor.plan.overhead).total


def write_rows(path: Path, length: int) -> Path:
    """Texts that are longer than `length` tokens each, so that every sample has that length."""
    chance = random.Random(0)
    rows = ({"text": " ".join(chance.choices(WORDS, k=2 * length))} for _ in range(32))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_model(folder: Path) -> str:
    """Random weights of four small layers with SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llamahome.config import Config
    from llamahome.model.load import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(resolve_model(None, Config().model))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
