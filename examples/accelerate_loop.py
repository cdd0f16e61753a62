"""Accelerate's loop with the engine's rows, layers and loss.

python examples/accelerate_loop.py data.jsonl model_folder
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamahome as lh
from llamahome.integrations.transformers import FlatCollator, fuse_loss, use_attention


def main(data: str, model_name: str, steps: int = 5) -> list[float]:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = AutoModelForCausalLM.from_pretrained(model_name, attn_implementation=use_attention()).train()
    lh.fuse(model)
    fuse_loss(model)
    store = lh.prepare(data, AutoTokenizer.from_pretrained(model_name)).train
    rank, ranks = accelerator.process_index, accelerator.num_processes
    rows = lh.StreamingDataset(store, rank=rank, world_size=ranks).loader(4, collate_fn=FlatCollator())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses: list[float] = []
    while len(losses) < steps:
        for batch in rows:
            loss = model(**{k: v.to(accelerator.device) if hasattr(v, "to") else v for k, v in batch.items()}).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if len(losses) == steps:
                break
    return losses


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]))
