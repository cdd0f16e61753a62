"""A training step of a whole model for `gpu.py`: a Llama of random weights with LoRA, made in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_kernels import SAMPLES, Shape

from llamahome.memory.flops import TrainingFlops, training_flops
from llamahome.model import attention
from llamahome.training.objective import Objective, flat_row

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(shape: Shape, layers: int, device: torch.device, implementation: str) -> Any:
    """A LlamaForCausalLM in bf16 with fp32 adapters on every linear layer, the same weights each time."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, max_position_embeddings=shape.tokens, tie_word_embeddings=True,
        attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        return get_peft_model(model, LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=TARGETS))


def flops_of(model: Any, shape: Shape) -> TrainingFlops:
    head = shape.vocabulary * shape.hidden
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    body = sum(p.numel() for p in model.parameters()) - head - adapters
    return training_flops(body, head, adapter_parameters=adapters)


def plain_loss(model: Any, shape: Shape, device: torch.device) -> Callable[[], torch.Tensor]:
    """transformers and PEFT alone: a batch of samples of one length, whole logits."""
    ids = torch.randint(shape.vocabulary, (SAMPLES, shape.tokens // SAMPLES), device=device)
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def engine_loss(model: Any, shape: Shape, device: torch.device) -> Callable[[], torch.Tensor]:
    """The engine: one flat row, its attention, logits in chunks."""
    ids = torch.randint(shape.vocabulary, (SAMPLES, shape.tokens // SAMPLES)).tolist()
    batch = flat_row(ids).to(device)
    objective = Objective(model)
    return lambda: objective(batch) / batch.num_trained


def variants(shape: Shape, layers: int, device: torch.device) -> Iterator[tuple[str, Any, Callable[[], torch.Tensor]]]:
    """Name, model and loss; a model is dropped before the next one is made."""
    from llamahome.model.fuse import fuse

    attention.register()
    model = build(shape, layers, device, "sdpa")
    yield "transformers + PEFT", model, plain_loss(model, shape, device)
    del model
    model = build(shape, layers, device, attention.NAME)
    yield "ours", model, engine_loss(model, shape, device)
    fuse(model)
    yield "ours, fused", model, engine_loss(model, shape, device)


def step_seconds(model: Any, loss: Callable[[], torch.Tensor], device: torch.device, steps: int) -> float:
    """Median seconds of an optimizer step, after two that compile and fill caches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    seconds = []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert value.isfinite()  # waits for the device, too
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])
