"""Computing the first layers again: the peak falls with each, the plan says by how much, and no gradient changes."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from llamahome.memory.layers import Adapter
from llamahome.memory.plan import plan_memory
from llamahome.memory.recompute import in_order_of_cost, parts
from llamahome.memory.shape import model_shape

LAYERS, TOKENS = 5, 256
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": True,
}  # fmt: skip
SHAPE = model_shape(CONFIG)


def step(layers: int) -> tuple[int, list[Any]]:
    """Most bytes that live in a forward and backward of a fused LoRA model, beyond weights; and the gradients."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from llamahome.memory.tracer import PeakTracker
    from llamahome.model import attention
    from llamahome.model.adapters import enable_checkpointing
    from llamahome.model.fuse import fuse
    from llamahome.training.objective import decode, flat_row

    attention.register()
    torch.manual_seed(0)
    causal = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation=attention.NAME)).bfloat16()
    model = get_peft_model(causal, LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1)).train()
    fuse(model)
    if layers:
        enable_checkpointing(model, layers)
    batch = flat_row([[1 + i % 50 for i in range(TOKENS)]])
    gc.collect()
    tracker = PeakTracker()
    tracker.count([*model.parameters(), *model.buffers()])
    before = tracker.live_bytes
    with tracker, torch.autocast("cpu", torch.bfloat16):
        decode(causal, batch).square().sum().backward()
    return tracker.peak_bytes - before, [p.grad for p in model.parameters() if p.requires_grad]


def test_each_of_the_first_layers_takes_what_it_saves_off_the_peak() -> None:
    import torch

    step(0)  # the first one makes what stays
    found = {layers: step(layers) for layers in range(LAYERS + 1)}
    peaks = {layers: peak for layers, (peak, _) in found.items()}
    planned = {n: plan_memory(CONFIG, lora=Adapter(rank=8, dropout=0.1), fused=True, micro_batch_tokens=TOKENS,
                              gradient_checkpointing=n).activations for n in peaks}  # fmt: skip
    for layers in range(1, LAYERS):
        assert peaks[0] - peaks[layers] == pytest.approx(planned[0] - planned[layers], rel=0.02)
    # The last layer's turn is the first in backward: to make it again saves nothing.
    assert peaks[LAYERS] >= peaks[LAYERS - 1]
    assert planned[LAYERS] == planned[LAYERS - 1]
    gradients = [grads for _, grads in found.values()]
    assert all(torch.equal(a, b) for grads in gradients[1:] for a, b in zip(gradients[0], grads, strict=True))


def test_as_many_layers_as_there_are_or_more_are_all() -> None:
    every = plan_memory(CONFIG, fused=True, gradient_checkpointing=True)
    assert plan_memory(CONFIG, fused=True, gradient_checkpointing=LAYERS) == every
    assert plan_memory(CONFIG, fused=True, gradient_checkpointing=LAYERS + 3) == every
    one = plan_memory(CONFIG, fused=True, gradient_checkpointing=1)
    assert (one.gradient_checkpointing, type(one.gradient_checkpointing)) == (1, int)


@pytest.mark.parametrize("trains_base", [False, True])
def test_a_layers_parts_are_its_whole_and_the_mlp_is_the_cheaper_one(trains_base: bool) -> None:
    found = parts(SHAPE, Adapter(), low=True, trains_base=trains_base, fused=True)
    mlp, rest, layer = found["mlp"], found["rest"], found["layer"]
    assert mlp.saved_bytes + rest.saved_bytes == layer.saved_bytes
    assert mlp.flops + rest.flops == layer.flops == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert mlp.bytes_per_kiloflop == pytest.approx(1000 / 64)  # of 2-byte types: one by the hidden size
    assert mlp.bytes_per_kiloflop > layer.bytes_per_kiloflop > rest.bytes_per_kiloflop
    assert set(parts(SHAPE, Adapter(), low=True, trains_base=trains_base, fused=False)) == {"layer"}


def test_settings_come_by_the_arithmetic_that_they_add() -> None:
    assert in_order_of_cost(SHAPE, fused=False) == [1, 2, 3, 4]
    assert in_order_of_cost(SHAPE, fused=True) == [1, 2, "mlp", 3, 4]  # 2 of 3 MLP weights, 5 layers: 2.5
