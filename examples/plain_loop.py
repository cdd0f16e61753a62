"""The engine's parts in a loop of your own.

python examples/plain_loop.py data.jsonl
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamahome as lh
from llamahome.model.attention import NAME, register
from llamahome.training.checkpoint import TrainingState
from llamahome.training.step import StepBatches


def main(data: str, model_name: str) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    register()
    model = AutoModelForCausalLM.from_pretrained(model_name, attn_implementation=NAME)
    store = lh.prepare(data, tokenizer).train
    order = lh.StepOrder(len(store), samples_per_step=8, seed=0)
    batches = StepBatches(store, order, lh.BatchProcessor(store), max_samples=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loop = lh.TrainingLoop(model, optimizer, batches, state=TrainingState(total_steps=5))
    losses = []
    for record in loop:
        losses.append(record["loss"])
        print(record["step"], record["loss"])
    return losses


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "HuggingFaceTB/SmolLM2-135M-Instruct")
