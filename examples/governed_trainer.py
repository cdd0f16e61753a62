"""The memory governor in Hugging Face's Trainer.

python examples/governed_trainer.py model_folder output_folder
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import llamahome as lh
from llamahome.integrations.transformers import GovernorCallback


def main(model_name: str, output: str) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(32 * 24).reshape(32, 24) % 97]
    arguments = TrainingArguments(
        output, per_device_train_batch_size=8, max_steps=3, learning_rate=1e-3, report_to="none", save_strategy="no",
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    plan = lh.plan_memory(model.config, method="full", precision="fp32", max_length=24)
    monitor = lh.MemoryMonitor("cuda" if torch.cuda.is_available() else "cpu")
    limit = int(0.9 * monitor.read().total_bytes)
    governor = lh.MemoryGovernor(limit, plan, monitor, longest_sample=24, step_tokens=192, maximum=64)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.add_callback(GovernorCallback(trainer, governor))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
