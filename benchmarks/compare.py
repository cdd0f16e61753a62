"""LlamaHome beside Hugging Face Trainer + PEFT: the same samples, each side in processes of its own, in turn A B A B.

    python benchmarks/compare.py --data gsm8k/train.jsonl --case lora-bf16
    python benchmarks/compare.py --data gsm8k/train.jsonl --write benchmarks/RESULTS.md     # all cases, a dated section
    python benchmarks/compare.py --quick             # built-in data, a few steps

The last line of stdout is a JSON object with, for each case: `speed_ratio` (real tokens per second, ours by theirs,
the median over the rounds), `cpu_ratio` (the same by processor time, for machines that others use too), `memory_ratio`
(peak memory of the process), each side's figures, `mfu` (ours: model operations per second by the best of the
machine's square matrix products before the first step), `mfu_usual` (by their median after the last one: a processor
that is busy for minutes is slower than at its best moment), `first_step_seconds`, and `loss_difference`, the largest
relative difference of a step's loss. `peer_spread` is the same between two runs of the peer, whole and in two
micro-batches: what rounding alone does. `from_fp32` and `peer_from_fp32` are those of each side in 16 bits from the
peer in fp32.
The first steps of each run are left out of the speeds.

Both sides train on the same samples at each step. `--ours` changes settings of our side alone, which the section then
names: with less memory on both sides, the peer computes its activations again and ours may cut the step instead, say
`--case lora-bf16-checkpointing --ours checkpointing='"mlp"' --ours micro_samples=1`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
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
    mfu = median(step.get("mfu") or 0.0 for step in steps)
    matmul = result["matmul_flops"]
    return {
        "tokens_per_s": median(step["tokens"] / step["seconds"] for step in steps),
        "tokens_per_cpu_s": median(step["tokens"] / step["cpu_seconds"] for step in steps),
        "peak_bytes": result["peak_bytes"],
        "first_step_seconds": result["first_step_seconds"],
        "mfu": mfu,
        "mfu_usual": mfu * matmul["best"] / matmul["usual"] if matmul else 0.0,
        "losses": [step["loss"] for step in result["steps"]],
    }


def compare(settings: dict[str, Any], own: dict[str, Any], rounds: int, warm: int) -> dict[str, Any]:
    """Both sides in turn; ratios within each round, medians over the rounds."""
    pairs = []
    peer = {**settings, "compile_mode": "none"}
    for _ in range(rounds):
        ours = measure("llamahome", settings | own, warm)
        theirs = measure("hf", peer, warm)
        pairs.append((ours, theirs))
        print(json.dumps({"llamahome": ours, "hf": theirs}), file=sys.stderr)
    ratio = lambda key: round(median(ours[key] / theirs[key] for ours, theirs in pairs), 3)  # noqa: E731
    middle = lambda side, key: round(median(pair[side][key] for pair in pairs), 3)  # noqa: E731
    figures = {
        "speed_ratio": ratio("tokens_per_s"), "cpu_ratio": ratio("tokens_per_cpu_s"),
        "memory_ratio": ratio("peak_bytes"),
        "loss_difference": max(difference(ours, theirs) for ours, theirs in pairs),
        "mfu": middle(0, "mfu"), "mfu_usual": middle(0, "mfu_usual"),
    }  # fmt: skip
    for key in ("tokens_per_s", "tokens_per_cpu_s", "peak_bytes", "first_step_seconds"):
        figures |= {key: middle(0, key), f"peer_{key}": middle(1, key)}
    if rounds > 1:
        halves = measure("hf", {**peer, "micro_samples": settings["samples"] // 2}, warm)
        figures["peer_spread"] = difference(halves, pairs[0][1])
    if rounds > 1 and settings["precision"] != "fp32":
        exact = measure("hf", {**peer, "precision": "fp32"}, warm)
        figures |= {"from_fp32": difference(pairs[0][0], exact), "peer_from_fp32": difference(pairs[0][1], exact)}
    return figures


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference of a step's loss."""
    return max(abs(a - b) / b for a, b in zip(one["losses"], other["losses"], strict=True))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Rows of Markdown for people."""
    lines = [
        "| | tokens/s, ours / theirs | speed | by CPU time | peak memory | memory | MFU by best, usual products "
        "| loss difference | peer's | both from fp32 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case, r in results.items():
        memory = f"{r['peak_bytes'] / 1e9:.2f} / {r['peer_peak_bytes'] / 1e9:.2f} GB"
        spread = f"{r['peer_spread']:.1e}" if "peer_spread" in r else ""
        exact = f"{r['from_fp32']:.1e} / {r['peer_from_fp32']:.1e}" if "from_fp32" in r else ""
        lines.append(
            f"| {case} | {r['tokens_per_s']:.0f} / {r['peer_tokens_per_s']:.0f} | {r['speed_ratio']:.2f} | "
            f"{r['cpu_ratio']:.2f} | {memory} | {r['memory_ratio']:.2f} | {r['mfu']:.2f}, {r['mfu_usual']:.2f} | "
            f"{r['loss_difference']:.1e} | {spread} | {exact} |"
        )
    return "\n".join(lines)


def write_section(path: Path, results: dict[str, dict[str, Any]], command: str, load: float) -> None:
    """Put a dated section before the newest one."""
    today = datetime.now(UTC).date().isoformat()
    text = path.read_text(encoding="utf-8")
    section = (
        f"## {today}, beside Hugging Face Trainer + PEFT\n\n`{command}`; load average {load:.1f} at the start.\n\n"
        f"{table(results)}\n\n"
    )
    head, mark, rest = text.partition("\n## ")
    path.write_text(f"{head}\n{section}{mark.lstrip()}{rest}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="training data, JSON lines [built-in examples]")
    parser.add_argument("--model", help="model folder, GGUF file or hub id [the embedded SmolLM2-135M]")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="one of them, may be repeated [all]")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warm", type=int, default=3, help="first steps that do not count")
    parser.add_argument("--samples", type=int, default=4, help="per step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile-mode", default="default", help="ours only")
    parser.add_argument("--ours", action="append", default=[], metavar="KEY=JSON", help="a setting of our side alone")
    parser.add_argument("--write", type=Path, help="a Markdown file that gets a section")
    parser.add_argument("--quick", action="store_true", help="LoRA in bf16, one round of 3 steps of 2 samples")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    if args.quick:
        args.case, args.steps, args.warm, args.samples, args.rounds = ["lora-bf16"], 3, 1, 2, 1
    load = os.getloadavg()[0]
    own = {key: json.loads(value) for key, _, value in (text.partition("=") for text in args.ours)}
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
                "samples": args.samples, "micro_samples": args.samples, "threads": args.threads,
                "compile_mode": args.compile_mode,
            }  # fmt: skip
            results[case] = compare(settings, own, args.rounds, args.warm)
            if not args.json:
                print(case, results[case], flush=True)
    if not args.json:
        print(table(results))
    if args.write:
        command = f"python benchmarks/compare.py --data {args.data and args.data.name} --rounds {args.rounds}"
        command += f" --steps {args.steps} --threads {args.threads}" + "".join(f" --ours {text}" for text in args.ours)
        write_section(args.write, results, command, load)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
