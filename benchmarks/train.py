"""Speed, memory and result of a LoRA run: rank 16 on all linear layers, SmolLM2-135M unless another model is named.

    python benchmarks/train.py --data gsm8k/train.jsonl --eval-data gsm8k/test.jsonl --steps 60
    python benchmarks/train.py --quick               # built-in data, under a minute

The last line of stdout is a JSON object: `real_tokens_per_s` (median over the steps, padding not counted), `peak_bytes`
of the process, `matmul_share` (model FLOPs by the machine's measured matrix-product peak), `padding_share`,
`loss_before` and `loss_after` on held-out samples.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from llamahome.config import Config
from llamahome.demo import write_demo_data
from llamahome.training.run import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder, GGUF file or hub id [the embedded SmolLM2-135M]")
    parser.add_argument("--data", help="training data [built-in examples]")
    parser.add_argument("--eval-data", help="held-out data [a part of the training data]")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples-per-step", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--eval-samples", type=int, default=200)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--compile-mode", default="none")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="4 steps of 4 samples")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.samples_per_step, args.eval_samples = 4, 4, 8
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            args.data = str(Path(folder, "data.jsonl"))
            write_demo_data(args.data)
        values = {
            "data.path": args.data,
            "data.eval_path": args.eval_data,
            "data.max_length": args.max_length,
            "model.name": args.model,
            "training.output": str(Path(folder, "run")),
            "training.eval_samples": args.eval_samples,
            "optimization.max_steps": args.steps,
            "optimization.global_batch_size": args.samples_per_step,
            "optimization.learning_rate": args.learning_rate,
            "processing.precision": args.precision,
            "processing.compile_mode": args.compile_mode,
            "monitor.sinks": ["none"],
        }
        config = Config.load(None, [*(f"{k}={json.dumps(v)}" for k, v in values.items()), *args.overrides])
        result = train(config)
        lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    warm = steps[len(steps) // 5 :]
    tokens = sum(record["tokens"] for record in steps)
    figures = {
        "real_tokens_per_s": round(median(record["tokens_per_second"] for record in warm), 1),
        "trained_tokens_per_s": round(median(r["trained_tokens"] / r["step_seconds"] for r in warm), 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "matmul_share": round(median(record["mfu"] for record in warm), 3),
        "padding_share": sum(record["padding_tokens"] for record in steps) / tokens,
        "loss_before": result.before.loss if result.before else None,
        "loss_after": result.after.loss if result.after else None,
        "steps": len(steps),
    }
    if not args.json:
        for name, value in figures.items():
            print(f"{name:22} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
