"""LlamaHome beside Hugging Face Trainer + PEFT: the same samples, each side in processes of its own, in turn A B A B.

    python benchmarks/compare.py --data gsm8k/train.jsonl --case lora-bf16
    python benchmarks/compare.py --quick             # built-in data, a few steps

The last line of stdout is a JSON object with, for each case: `speed_ratio` (real tokens per second, ours by theirs,
the median over the rounds), `cpu_ratio` (the same by processor time, for machines that others use too), `memory_ratio`
(peak memory of the process), each side's figures, and `loss_difference`, the largest relative difference of a step's
loss. The first steps of each run are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "lora-bf16": {},
    "lora-fp32": {"precision": "fp32"},
    "lora-bf16-checkpointing": {"checkpointing": True},
    "full-bf16": {"method": "full"},
}
DEFAULTS = {"method": "lora", "precision": "bf16", "checkpointing": False}


def measure(side: str, settings: dict[str, Any], warm: int) -> dict[str, Any]:
    """One run: medians over its steps after the first `warm`."""
    with tempfile.TemporaryDirectory() as folder:
        request = json.dumps({**settings, "side": side, "folder": folder})
        worker = Path(__file__).with_name("peer_hf.py")
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        done = subprocess.run(
            [sys.executable, worker, request], capture_output=True, text=True, check=False, env=environment
        )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    steps = result["steps"][warm:]
    return {
        "tokens_per_s": median(step["tokens"] / step["seconds"] for step in steps),
        "tokens_per_cpu_s": median(step["tokens"] / step["cpu_seconds"] for step in steps),
        "peak_bytes": result["peak_bytes"],
        "losses": [step["loss"] for step in result["steps"]],
    }


def compare(settings: dict[str, Any], rounds: int, warm: int) -> dict[str, Any]:
    """Both sides in turn; ratios within each round, medians over the rounds."""
    pairs = []
    for _ in range(rounds):
        ours = measure("llamahome", settings, warm)
        theirs = measure("hf", {**settings, "compile_mode": "none"}, warm)
        pairs.append((ours, theirs))
        print(json.dumps({"llamahome": ours, "hf": theirs}), file=sys.stderr)
    ratio = lambda key: round(median(ours[key] / theirs[key] for ours, theirs in pairs), 3)  # noqa: E731
    middle = lambda side, key: round(median(pair[side][key] for pair in pairs), 1)  # noqa: E731
    difference = [
        abs(one - other) / other
        for ours, theirs in pairs
        for one, other in zip(ours["losses"], theirs["losses"], strict=True)
    ]
    return {
        "speed_ratio": ratio("tokens_per_s"), "cpu_ratio": ratio("tokens_per_cpu_s"),
        "memory_ratio": ratio("peak_bytes"), "loss_difference": max(difference),
        "tokens_per_s": middle(0, "tokens_per_s"), "peer_tokens_per_s": middle(1, "tokens_per_s"),
        "tokens_per_cpu_s": middle(0, "tokens_per_cpu_s"), "peer_tokens_per_cpu_s": middle(1, "tokens_per_cpu_s"),
        "peak_bytes": middle(0, "peak_bytes"), "peer_peak_bytes": middle(1, "peak_bytes"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="training data, JSON lines [built-in examples]")
    parser.add_argument("--model", help="model folder, GGUF file or hub id [the embedded SmolLM2-135M]")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="one of them, may be repeated [all]")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--samples", type=int, default=4, help="per step, all in one micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile-mode", default="none", help="ours only")
    parser.add_argument("--quick", action="store_true", help="LoRA in bf16, one round of 3 steps of 2 samples")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    if args.quick:
        args.case, args.steps, args.warm, args.samples, args.rounds = ["lora-bf16"], 3, 1, 2, 1
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        if args.data is None:
            from llamahome.demo import write_demo_data

            write_demo_data(data)
        else:
            with args.data.open(encoding="utf-8") as rows:
                data.write_text("".join(islice(rows, args.steps * args.samples)), encoding="utf-8")
        for case in args.case or CASES:
            settings = {
                **DEFAULTS, **CASES[case], "data": str(data), "model": args.model, "steps": args.steps,
                "samples": args.samples, "threads": args.threads, "compile_mode": args.compile_mode,
            }  # fmt: skip
            results[case] = compare(settings, args.rounds, args.warm)
            if not args.json:
                print(case, results[case], flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
