"""The memory governor in a loop of your own: batches are cut to fit, and replayed when memory runs out.

python examples/governed_loop.py model_folder
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

import llamahome as lh
from llamahome.integrations.split import GovernedBatch
from llamahome.memory.monitor import format_bytes


def main(model_name: str, steps: int = 3) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = {"input_ids": torch.arange(8 * 32).reshape(8, 32) % 97}
    batch["labels"] = batch["input_ids"]

    plan = lh.plan_memory(model.config, method="full", precision="fp32", max_length=32)
    monitor = lh.MemoryMonitor()
    limit = monitor.read().used_bytes + 4 * 10**9
    governor = lh.MemoryGovernor(limit, plan, monitor, longest_sample=32, step_tokens=256, maximum=64)
    governed = GovernedBatch(governor, model.parameters(), on_event=print)
    trained = batch["labels"][:, 1:].numel()

    def backward(part: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(**part, num_items_in_batch=trained).loss  # of these rows, by the tokens of all
        loss.backward()
        return loss

    losses = []
    for step in range(steps):
        losses.append(float(governed.run(batch, backward, step=step)))
        optimizer.step()
        optimizer.zero_grad()
        governed.observe()
        print(step, losses[-1], format_bytes(governor.reading.peak_bytes), "of", format_bytes(limit))
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
