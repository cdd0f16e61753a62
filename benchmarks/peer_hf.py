"""One measured run of Hugging Face Trainer + PEFT, or of LlamaHome, for `compare.py`; each in a process of its own.

    python benchmarks/peer_hf.py '{"side": "hf", "precision": "bf16", ...}'

Takes its settings as one JSON object and prints one, as the last line: `steps`, each with real tokens, seconds of wall
clock and of processor time, the loss and (ours) `mfu`; `peak_bytes`, the most memory that the process has held (VmHWM);
`first_step_seconds`, from the start of the process to the end of its first step; ours also `matmul_flops` per second of
square products, `best` of those before the first step, which `mfu` is taken by, and `usual`, the median of those
made for two seconds after the last step.
Both sides train on the same token ids in the same order, from the same first adapter.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil

from llamahome.config import Config

LORA = {"lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.0, "lora.target_modules": "all-linear"}


def configuration(settings: dict[str, Any]) -> Config:
    """LlamaHome's configuration of the run; the peer takes its data and adapter from it too."""
    return Config.load(None, {
        **LORA,
        "data.path": settings["data"],
        "data.shuffle": False,
        "data.validation_split": 0.0,
        "data.max_length": 512,
        "model.name": settings["model"],
        "training.output": str(Path(settings["folder"], "run")),
        "training.method": settings["method"],
        "training.batch_size": settings["micro_samples"],
        "training.save_steps": 10**6,
        "optimization.global_batch_size": settings["samples"],
        "optimization.max_steps": settings["steps"],
        "optimization.learning_rate": 2e-4,
        "optimization.scheduler_type": "constant",
        "optimization.warmup_steps": 0,
        "optimization.weight_decay": 0.0,
        "processing.precision": settings["precision"],
        "processing.compile_mode": settings["compile_mode"],
        "processing.gradient_checkpointing": settings["checkpointing"],
        "processing.threads": settings["threads"],
        "processing.device": "cpu",
        "monitor.sinks": [],
    })  # fmt: skip


class Stopwatch:
    """Wall clock and processor time of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.first_step_seconds = 0.0
        self.matmul_flops: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter(), time.process_time()

    def lap(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.steps.append({"seconds": wall - self._last[0], "cpu_seconds": cpu - self._last[1]})
        self.first_step_seconds = self.first_step_seconds or time.time() - psutil.Process().create_time()
        self.restart()


def run_llamahome(settings: dict[str, Any]) -> Stopwatch:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
    from llamahome.training.rundir import RunFolder
    from llamahome.training.setup import assemble

    config = configuration(settings)
    with RunFolder(config.training.output, fresh=True) as folder:
        parts = assemble(config, folder, None)
        watch = Stopwatch()
        for record in parts.loop:
            watch.lap()
            watch.steps[-1] |= {key: record[key] for key in ("tokens", "loss", "mfu")}
            watch.restart()
        usual = usual_matmul_flops(settings["precision"])
        watch.matmul_flops = {"best": parts.loop.metrics.tracker.peak_flops or usual, "usual": usual}
    return watch


def usual_matmul_flops(precision: str, seconds: float = 2.0) -> float:
    """The median of what square products reach, where `measure_matmul_peak` takes the best."""
    from llamahome.monitor.tracker import measure_matmul_peak

    end, rates = time.perf_counter() + seconds, []
    while time.perf_counter() < end:
        rates.append(measure_matmul_peak(precision, seconds=0.0))
    return median(rates)


def run_hf(settings: dict[str, Any]) -> Stopwatch:
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from llamahome.model.adapters import apply_adapter
    from llamahome.model.load import load_model, load_tokenizer, resolve_model

    config = configuration(settings)
    torch.set_num_threads(settings["threads"])
    low = settings["precision"] == "bf16"
    source = resolve_model(config.model.name, config.model)
    tokenizer = load_tokenizer(source)
    dtype = torch.bfloat16 if low and settings["method"] == "lora" else torch.float32
    model = load_model(source, dtype=dtype, device="cpu", attention="sdpa")
    model = apply_adapter(model, config)
    if settings["checkpointing"] and settings["method"] == "lora":
        model.enable_input_require_grads()
    watch, tokens = Stopwatch(), []

    class Laps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.restart()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.lap()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                watch.steps[-1]["loss"] = float(logs["loss"])

    padded = DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100)

    def collate(rows: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(row["input_ids"]) for row in rows))
        return padded(rows)

    arguments = TrainingArguments(
        output_dir=str(Path(settings["folder"], "peer")), per_device_train_batch_size=settings["micro_samples"],
        gradient_accumulation_steps=settings["samples"] // settings["micro_samples"],
        max_steps=settings["steps"], learning_rate=2e-4, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=config.optimization.max_grad_norm, logging_steps=1, train_sampling_strategy="sequential",
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, optim="adamw_torch_fused", bf16=low,
        gradient_checkpointing=settings["checkpointing"], dataloader_num_workers=0,
    )  # fmt: skip
    Trainer(
        model=model, args=arguments, train_dataset=rows_of(config, tokenizer), data_collator=collate,
        callbacks=[Laps()],
    ).train()  # fmt: skip
    parts = settings["samples"] // settings["micro_samples"]
    for i, step in enumerate(watch.steps):
        step["tokens"] = sum(tokens[i * parts : (i + 1) * parts])
    return watch


def rows_of(config: Config, tokenizer: Any) -> list[dict[str, Any]]:
    """LlamaHome's token ids and labels, as a peer's collator takes them."""
    from llamahome.data.prepare import prepare

    store = prepare(config.data.path, tokenizer, config=config).train
    rows = []
    for i in range(len(store)):
        ids, trained = store.document(i)
        labels = [int(t) if m else -100 for t, m in zip(ids, trained, strict=True)]
        rows.append({"input_ids": ids.tolist(), "labels": labels})
    return rows


def main() -> None:
    settings = json.loads(sys.argv[1])
    watch = {"hf": run_hf, "llamahome": run_llamahome}[settings["side"]](settings)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    result = {"steps": watch.steps, "peak_bytes": int(peak.split()[1]) * 1024, "matmul_flops": watch.matmul_flops}
    print(json.dumps(result | {"first_step_seconds": watch.first_step_seconds}))


if __name__ == "__main__":
    main()
