"""Hugging Face's Trainer + PEFT as it comes, beside the same Trainer with the engine's rows, layers and loss.

    python benchmarks/hf_trainer.py --data gsm8k/train.jsonl
    python benchmarks/hf_trainer.py --quick --json       # built-in data, a few steps

Both sides are Trainer, with the same samples, adapter and settings at each step; ours differs by `FlatCollator`,
`fuse(model)` and `fuse_loss(model)`. Each run is a process of its own, in turn A B A B. The last line of stdout is a
JSON object: `speed_ratio` and `memory_ratio` (ours by theirs, medians over the rounds), `loss_difference` (largest
relative difference of a step's loss) and each side's figures. Steps before `--warm` are left out of the speeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """One side's training: seconds, loss and tokens of each step, and the process's peak memory."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from llamahome.config import Config
    from llamahome.data.dataset import StreamingDataset
    from llamahome.data.prepare import prepare
    from llamahome.integrations.transformers import FlatCollator, fuse_loss, use_attention
    from llamahome.model.adapters import apply_adapter
    from llamahome.model.fuse import fuse
    from llamahome.model.load import load_model, load_tokenizer, resolve_model

    torch.set_num_threads(settings["threads"])
    ours, low = settings["side"] == "ours", settings["precision"] == "bf16"
    config = Config.load(None, {"data.path": settings["data"], "data.validation_split": 0.0, "data.max_length": 512,
                                "lora.dropout": 0.0})  # fmt: skip
    source = resolve_model(None, config.model)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.bfloat16 if low else torch.float32, device="cpu",
                       attention=use_attention() if ours else "sdpa")  # fmt: skip
    model = apply_adapter(model, config)
    if ours:
        fuse(model)
        fuse_loss(model)
    store = prepare(config.data.path, tokenizer, config=config).train
    collate = FlatCollator() if ours else DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100)
    steps: list[dict[str, float]] = []
    tokens: list[int] = []

    def counted(rows: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows if ours else [{name: value.tolist() for name, value in row.items()} for row in rows])

    class Laps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append({"seconds": time.perf_counter() - self.begun})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                steps[-1]["loss"] = float(logs["loss"])

    arguments = TrainingArguments(
        output_dir=settings["folder"], per_device_train_batch_size=settings["samples"], max_steps=settings["steps"],
        learning_rate=2e-4, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, optim="adamw_torch_fused", bf16=low, weight_decay=0.0,
        accelerator_config={"dispatch_batches": False},
    )  # fmt: skip
    dataset = StreamingDataset(store, seed=0)
    Trainer(model, arguments, train_dataset=dataset, data_collator=counted, callbacks=[Laps()]).train()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    for step, count in zip(steps, tokens, strict=False):
        step["tokens"] = count
    return {"steps": steps, "peak_bytes": int(peak.split()[1]) * 1024}


def measure(settings: dict[str, Any], side: str) -> dict[str, Any]:
    """`run` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        request = json.dumps({**settings, "side": side, "folder": folder})
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        done = subprocess.run([sys.executable, __file__, "--run", request], capture_output=True, text=True,
                              check=False, env=environment)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def speed(result: dict[str, Any], warm: int) -> float:
    """Real tokens per second, the median over the steps after the first `warm`."""
    return median(step["tokens"] / step["seconds"] for step in result["steps"][warm:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="rows to train on; the built-in examples without it")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--samples", type=int, default=4, help="samples per step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="one round of 3 steps")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(run(json.loads(given.run))))
        return
    if given.quick:
        given.rounds, given.steps, given.warm, given.samples = 1, 3, 1, 2
    names = ("data", "precision", "samples", "steps", "threads")
    settings = {name: getattr(given, name) for name in names}
    speeds, peaks, differences = [], [], []
    for number in range(given.rounds):
        theirs, ours = measure(settings, "theirs"), measure(settings, "ours")
        pair = speed(ours, given.warm), speed(theirs, given.warm)
        speeds.append(pair[0] / pair[1])
        peaks.append(ours["peak_bytes"] / theirs["peak_bytes"])
        losses = zip(ours["steps"], theirs["steps"], strict=True)
        differences.append(max(abs(one["loss"] - other["loss"]) / other["loss"] for one, other in losses))
        if not given.json:
            print(f"round {number + 1}: {pair[0]:.0f} and {pair[1]:.0f} tokens/s ({speeds[-1]:.2f}), "
                  f"{ours['peak_bytes'] / 1e9:.2f} and {theirs['peak_bytes'] / 1e9:.2f} GB ({peaks[-1]:.2f}), "
                  f"losses differ by {differences[-1]:.1e}", flush=True)  # fmt: skip
    print(json.dumps({"speed_ratio": median(speeds), "memory_ratio": median(peaks),
                      "loss_difference": max(differences), "rounds": given.rounds, **settings}))  # fmt: skip


if __name__ == "__main__":
    main()
