"""The memory contract on a real model: how near the plan is, and whether runs under real limits finish within them.

    python benchmarks/governor.py                 # SmolLM2-135M and a tiny model: 12 plans, limits, a competitor
    python benchmarks/governor.py --plans         # the plans only; --limits: the limits only
    python benchmarks/governor.py --quick         # two plans and one limit, about a minute on two free cores

Each measurement is a process of its own. The last line of stdout is a JSON object: `plan_error_max` (largest
|planned / measured - 1| of the peaks), `runs` (under a limit), `kills` (ended by the kernel or by an error),
`peak_over_limit` (highest peak by its limit), `throughput_share` (tokens per second with a limit of twice the minimum
by the best of fixed batch sizes). Limits are RLIMIT_DATA, so nothing is mocked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ("the", "sea", "mill", "river", "stone", "fox", "train", "rain", "home", "station", "dog", "late", "dark")
CHECKPOINTED = {"processing.gradient_checkpointing": True}
FULL, FP32 = {"training.method": "full"}, {"processing.precision": "fp32"}
# Model, samples per micro-batch, tokens per sample, settings.
PLANS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("smollm2", 1, 512, {}),
    ("smollm2", 4, 512, {}),
    ("smollm2", 2, 512, CHECKPOINTED),
    ("smollm2", 8, 256, CHECKPOINTED),
    ("smollm2", 1, 512, FP32),
    ("smollm2", 4, 256, FP32 | CHECKPOINTED),
    ("smollm2", 1, 256, FULL),
    ("smollm2", 1, 256, FULL | FP32 | CHECKPOINTED),
    ("tiny", 4, 512, {}),
    ("tiny", 8, 256, FP32),
    ("tiny", 4, 512, FULL),
    ("tiny", 8, 512, FULL | CHECKPOINTED),
]
LIMITS = (1.15, 1.5, 3.0)  # of the smallest limit that the plan allows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", action="store_true", help="only compare plans with peaks")
    parser.add_argument("--limits", action="store_true", help="only run under limits")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    say = (lambda *_: None) if args.json else print
    figures: dict[str, Any] = {"plan_error_max": None, "runs": None, "kills": None, "peak_over_limit": None,
                               "throughput_share": None}  # fmt: skip
    if not args.limits:
        figures |= compare_plans(PLANS[:1] + PLANS[8:9] if args.quick else PLANS, say)
    if not args.plans:
        figures |= run_under_limits(LIMITS[1:2] if args.quick else LIMITS, say, alone=args.quick)
    print(json.dumps(figures))


def compare_plans(cases: list[tuple[str, int, int, dict[str, Any]]], say: Any) -> dict[str, Any]:
    """Peak of each case's steps against its plan."""
    errors = []
    for model, samples, length, settings in cases:
        found = spawn({"model": model, "samples": samples, "length": length, "settings": settings})
        if "error" in found:
            say(f"{model} {samples} x {length} {settings}: {found['error']}")
            continue
        errors.append(found["planned"] / found["peak"] - 1)
        say(f"{model} {samples} x {length} {settings}: planned {found['planned'] / 1e6:.0f} MB, measured "
            f"{found['peak'] / 1e6:.0f} MB ({errors[-1]:+.1%}); slack {found['slack']:.2f}")  # fmt: skip
    return {"plan_error_max": max(map(abs, errors)), "plans": len(errors)}


def run_under_limits(shares: tuple[float, ...], say: Any, *, alone: bool) -> dict[str, Any]:
    """Runs under RLIMIT_DATA, one beside a process that takes and frees memory, and the speed a limit costs."""
    case = {"model": "smollm2", "samples": 0, "length": 256, "settings": {}, "steps": 3}
    minimum = spawn({**case, "steps": 0})["minimum"]
    kills, over, runs = 0, 0.0, 0
    for share, beside in [(share, False) for share in shares] + ([] if alone else [(1.5, True)]):
        competitor = subprocess.Popen([sys.executable, "-c", COMPETITOR]) if beside else None
        found = spawn({**case, "limit": int(share * minimum)})
        if competitor is not None:
            competitor.terminate()
            competitor.wait()
        runs, kills = runs + 1, kills + ("error" in found)
        over = max(over, found.get("peak", 0) / (share * minimum))
        say(f"limit {share:.2f} x {minimum / 1e6:.0f} MB{', beside another' if beside else ''}: "
            f"{found.get('error') or 'finished'}, peak {found.get('peak', 0) / 1e6:.0f} MB")  # fmt: skip
    too_small = spawn({**case, "limit": int(0.8 * minimum)})
    say(f"limit 0.80: exit {too_small.get('code')}, {too_small.get('error')}")
    figures = {"runs": runs, "kills": kills, "peak_over_limit": over, "too_small_exit": too_small.get("code")}
    if alone:
        return figures
    held = spawn({**case, "limit": int(2 * minimum), "steps": 6})
    best = max(spawn({**case, "samples": samples, "steps": 6})["speed"] for samples in (2, 4, 8))
    return figures | {"throughput_share": held["speed"] / best}


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
    from llamahome.memory.ladder import SMALL_LOSS_CHUNK
    from llamahome.memory.plan import plan_memory
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
            "model.name": tiny_model(Path(folder, "tiny")) if case["model"] == "tiny" else None,
            "training.output": str(Path(folder, "run")),
            "training.memory_limit": "100%",
            "training.batch_size": samples or "auto",
            "optimization.max_steps": max(1, case.get("steps", 2)),
            "optimization.global_batch_size": 2 * samples or 8,
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
                architecture = loop.objective.causal.config
                minimum = plan_memory(
                    architecture, max_length=length, gradient_checkpointing=True, loss_chunk=SMALL_LOSS_CHUNK,
                    precision=loop.precision.name, step_tokens=8 * length, fused=True,
                ).total  # fmt: skip
                if case.get("steps", 2) == 0:
                    return {"minimum": minimum}
                for _ in calibrate(loop):
                    pass
                started = time.perf_counter()
                records = list(loop)
        except LlamaHomeError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        seconds, peak = time.perf_counter() - started, max(record["memory_peak_bytes"] for record in records)
        plan = governor.plan.at(records[-1]["micro_batch_tokens"])
        return {
            "minimum": minimum,
            "planned": plan.total,
            "peak": peak,
            "slack": (peak - plan.live) / (plan.activations + plan.loss),
            "speed": sum(record["tokens"] for record in records) / seconds,
        }


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
