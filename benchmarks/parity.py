"""Losses step by step: LlamaHome beside Hugging Face Trainer + PEFT on the same samples in the same order, in fp32.

    python benchmarks/parity.py                      # the embedded SmolLM2-135M on built-in data
    python benchmarks/parity.py --model M --data F   # any model folder and data file

The last line of stdout is a JSON object; `max_relative_difference` is the largest |ours - theirs| / theirs over all
steps and micro-batch sizes. Both sides start from the same adapter and see the same token ids and labels.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from llamahome.config import Config
from llamahome.data.prepare import prepare
from llamahome.demo import write_demo_data
from llamahome.model.adapters import apply_adapter
from llamahome.model.load import load_model, load_tokenizer, resolve_model
from llamahome.training.run import train


def settings(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    return {
        "data.path": args.data,
        "data.shuffle": False,
        "data.max_length": args.max_length,
        "data.validation_split": 0.0,
        "model.name": args.model,
        "training.output": str(output),
        "training.method": args.method,
        "optimization.global_batch_size": args.samples_per_step,
        "optimization.max_steps": args.steps,
        "optimization.learning_rate": args.learning_rate,
        "optimization.warmup_steps": 2,
        "processing.precision": "fp32",
        "processing.compile_mode": "none",
        "processing.device": "cpu",
        "processing.threads": torch.get_num_threads(),
        "monitor.sinks": [],
    }


def our_losses(config: Config) -> list[float]:
    result = train(config)
    records = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "event" not in record]


def peer_losses(config: Config, micro_batch: int, output: Path) -> list[float]:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    source = resolve_model(config.model.name, config.model)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float32, device="cpu", attention="sdpa")
    model = apply_adapter(model, config)
    losses: list[float] = []

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    optimization = config.optimization
    per_step = config.global_batch_size()
    arguments = TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=per_step // micro_batch, max_steps=optimization.max_steps,
        learning_rate=optimization.learning_rate, weight_decay=optimization.weight_decay, lr_scheduler_type="cosine",
        warmup_steps=optimization.warmup_steps, max_grad_norm=optimization.max_grad_norm, logging_steps=1,
        train_sampling_strategy="sequential", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        optim="adamw_torch_fused",
    )  # fmt: skip
    store = prepare(config.data.path, tokenizer, config=config).train
    rows = []
    for i in range(len(store)):
        ids, trained = store.document(i)
        labels = [int(t) if m else -100 for t, m in zip(ids, trained, strict=True)]
        rows.append({"input_ids": ids.tolist(), "labels": labels})
    collator = DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100)
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[Losses()]).train()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder, GGUF file or hub id [the embedded SmolLM2-135M]")
    parser.add_argument("--data", help="data file [built-in examples]")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples-per-step", type=int, default=16)
    parser.add_argument("--micro-batches", default="1,2,4,16")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--quick", action="store_true", help="3 steps of 4 samples")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.samples_per_step, args.micro_batches = 3, 4, "2,4"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if args.data is None:
            args.data = str(scratch / "data.jsonl")
            write_demo_data(args.data)
        worst, figures = 0.0, {}
        # The peer's own spread over its micro-batch sizes shows what rounding alone does.
        base = Config.load(None, settings(args, scratch / "peer"))
        sizes = [int(size) for size in args.micro_batches.split(",")]
        theirs = peer_losses(base, sizes[-1], scratch / "peer")
        for size in [*sizes, 0]:
            values = {**settings(args, scratch / f"ours-{size}"), "training.batch_size": size or "auto"}
            ours = our_losses(Config.load(None, values))
            assert len(ours) == len(theirs) == args.steps
            difference = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
            figures[f"micro_batch_{size or 'auto'}"] = difference
            worst = max(worst, difference)
            if not args.json:
                print(f"micro-batch {size or 'auto'}: largest relative difference {difference:.2e}")
    print(json.dumps({"max_relative_difference": worst, "steps": args.steps, "last_loss": theirs[-1], **figures}))


if __name__ == "__main__":
    main()
