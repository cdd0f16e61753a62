"""What 4-bit bases and quantization-aware training cost and give: SmolLM2-135M unless another model is named.

    python benchmarks/quantization.py lora --data gsm8k/train.jsonl --eval-data gsm8k/test.jsonl --output runs
    python benchmarks/quantization.py qlora --data ... --eval-data ... --output runs --minutes 8
    python benchmarks/quantization.py qat --scheme int4-weight --samples-per-step 4 --data ... --output runs
    python benchmarks/quantization.py --quick        # built-in data, LoRA and QLoRA, under a minute

A run goes into `OUTPUT/METHOD`; with `--minutes` it ends after that time, saved, and the same command goes on with it.
The last line of stdout is a JSON object: for each method `<method>_loss_before`, `<method>_loss_after` on held-out
samples, `<method>_step_peak_bytes` (the largest over the steps) and `<method>_peak_bytes` of its whole process.

`qat` trains all weights twice by the same settings, plainly and for `--scheme`, and turns both results into torchao's
quantized layers. `plain_loss` is that of the plain one before, `ptq_loss` after it, `qat_loss` that of the other after
it; `recovered` is the share of the loss that quantizing costs which training for it brings back.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Timer
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from llamahome.config import Config
from llamahome.data.prepare import prepare as prepare_data
from llamahome.demo import write_demo_data
from llamahome.errors import Interrupted
from llamahome.model.fake_quant import INT4, INT8, PAIRED, Scheme, convert, prepare, record_of
from llamahome.training.evaluate import evaluate_store
from llamahome.training.objective import build_objective
from llamahome.training.precision import Precision
from llamahome.training.run import resume, train
from llamahome.training.setup import load_trained_model
from llamahome.training.signals import StopSignal

METHODS = ("lora", "qlora")  # what is compared without a method named
RATES = {"lora": 2e-4, "qlora": 2e-4, "full": 1e-4, "qat": 1e-4}
GROUP = 32


def settings(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """60 steps of 16 samples as in `train.py`, in micro-batches of four whatever memory there is."""
    return {
        "data.path": args.data,
        "data.eval_path": args.eval_data,
        "model.name": args.model,
        "training.method": method,
        "training.output": str(output_of(args, method)),
        "training.batch_size": 4,
        "training.eval_samples": args.eval_samples,
        "training.save_steps": 20,
        "optimization.max_steps": args.steps,
        "optimization.global_batch_size": args.samples_per_step,
        "optimization.learning_rate": RATES[method],
        "optimization.warmup_steps": 5,
        "processing.compile_mode": "none",
        "processing.gradient_checkpointing": False,
        "processing.threads": args.threads,
        "monitor.sinks": ["none"],
        **({"qat.scheme": args.scheme, "qat.group_size": GROUP} if method == "qat" else {}),
    }


def output_of(args: argparse.Namespace, method: str) -> Path:
    return Path(args.output, f"qat-{args.scheme.replace('/', '-')}" if method == "qat" else method)


def train_one(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Begin or go on with the run of `method`; figures once it is done, nothing where its time was up."""
    output = output_of(args, method)
    timer = Timer(max(0.0, args.ends - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    if args.minutes:
        timer.start()
    try:
        with StopSignal() as signals:
            if list(output.glob("checkpoint-*")):
                resume(output, signals=signals)
            else:
                train(Config.load(None, settings(args, method)), signals=signals)
    except Interrupted as stopped:
        print(f"{method}: {stopped}", file=sys.stderr)
    finally:
        timer.cancel()
    return figures(output, method, args.steps)


def figures(output: Path, method: str, steps: int) -> dict[str, Any]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if "event" not in line]
    before = next(line["eval_loss"] for line in lines if line.get("event") == "evaluation")
    found = {
        "steps": len(records),
        "loss_before": before,
        "loss_after": records[-1].get("eval_loss") if len(records) == steps else None,
        "step_peak_bytes": max(record["memory_peak_bytes"] for record in records),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return {f"{method}_{name}": value for name, value in found.items()}


def train_and_convert(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of training plainly and by `qat`, then of both after conversion; what time allows of it."""
    found: dict[str, Any] = {}
    for method in ("full", "qat"):
        output = output_of(args, method)
        found |= figures(output, method, args.steps) if (output / "final").exists() else train_one(args, method)
        if found[f"{method}_loss_after"] is None:
            return found
    plain = held_out_loss(args, "full", quantized=False)
    ptq, qat = (held_out_loss(args, method, quantized=True) for method in ("full", "qat"))
    return found | {"plain_loss": plain, "ptq_loss": ptq, "qat_loss": qat, "recovered": (ptq - qat) / (ptq - plain)}


def held_out_loss(args: argparse.Namespace, method: str, *, quantized: bool) -> float:
    """The loss, computed in fp32, of what `method` left; in torchao's layers where `quantized`."""
    config = Config.load(None, settings(args, method))
    precision = Precision("fp32", "cpu")
    model, tokenizer = load_trained_model(
        str(output_of(args, method) / "final"), config, torch.device("cpu"), precision
    )
    if quantized:
        if record_of(model) is None:
            prepare(model, Scheme(args.scheme, GROUP))
        convert(model)
    store = prepare_data(args.data, tokenizer, config=config, eval_data=args.eval_data).validation
    assert store is not None
    return evaluate_store(
        build_objective(model), store, precision=precision, token_budget=2048, max_samples=args.eval_samples
    ).loss


def each_alone(args: argparse.Namespace) -> dict[str, Any]:
    """Every method in a process of its own, for its peak of memory."""
    found: dict[str, Any] = {}
    for method in METHODS:
        words = [sys.executable, __file__, method, "--json"]
        for name in (
            "data",
            "eval_data",
            "model",
            "output",
            "steps",
            "samples_per_step",
            "eval_samples",
            "threads",
            "minutes",
        ):
            if (value := getattr(args, name)) is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "method", nargs="?", choices=(*METHODS, "qat"), help="one [LoRA and QLoRA, each in its own process]"
    )
    parser.add_argument("--scheme", choices=(PAIRED, INT4, INT8), default=INT4, help="of qat [%(default)s]")
    parser.add_argument("--model", help="model folder, GGUF file or hub id [the embedded SmolLM2-135M]")
    parser.add_argument("--data", help="training data [built-in examples]")
    parser.add_argument("--eval-data", help="held-out data [a part of the training data]")
    parser.add_argument("--output", help="folder of the runs [a temporary one]")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples-per-step", type=int, default=16)
    parser.add_argument("--eval-samples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="end after so long, to go on with the same command")
    parser.add_argument("--quick", action="store_true", help="4 steps of 4 samples")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.samples_per_step, args.eval_samples = 4, 4, 8
    with tempfile.TemporaryDirectory() as folder:
        args.output = args.output or str(Path(folder, "runs"))
        if args.data is None:
            args.data = str(Path(folder, "data.jsonl"))
            write_demo_data(args.data)
        args.ends = time.monotonic() + 60 * (args.minutes or 0)
        if args.method == "qat":
            found = train_and_convert(args)
        else:
            found = train_one(args, args.method) if args.method else each_alone(args)
    if not args.json:
        for name, value in found.items():
            print(f"{name:24} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
