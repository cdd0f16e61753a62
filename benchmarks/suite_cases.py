"""What `suite.py` measures: each part of the engine beside a fixed reference that does the same work.

A case makes two functions, ours and the reference; what they return is dropped. Sizes are SmolLM2-135M's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gpu_model
import torch
from gpu_kernels import Shape
from torch import Tensor
from torch.nn import functional as F

from llamahome.kernels import linear_cross_entropy, varlen_attention
from llamahome.model import attention
from llamahome.model.fuse import fuse
from llamahome.training.checkpoint import TrainingState, save_checkpoint
from llamahome.training.objective import Objective, flat_row

SHAPE = Shape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, 512, 16)
LENGTHS = (41, 188, 96, 75, 130, 62, 233, 58, 149, 84)  # of samples; to pad them to the longest costs half of a batch
TRAINED = 0.4  # share of tokens that a chat sample trains


class Sides(NamedTuple):
    """Memory is compared with the reference's peak, or with `content` bytes where the reference makes no tensors."""

    ours: Callable[[], Any]
    reference: Callable[[], Any]
    content: int = 0


def loss() -> Sides:
    """512 trained tokens through a frozen head of 49,152: in chunks, and with whole logits."""
    hidden = torch.randn(512, SHAPE.hidden, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(SHAPE.vocabulary, SHAPE.hidden, dtype=torch.bfloat16) * SHAPE.hidden**-0.5
    labels = torch.randint(SHAPE.vocabulary, (512,))

    def ours() -> Any:
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)

    def reference() -> Any:
        return torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight).float(), labels), hidden)

    return Sides(ours, reference)


def packed_attention() -> Sides:
    """Samples in one flat row, and padded to the longest in a masked SDPA."""
    count, longest = len(LENGTHS), max(LENGTHS)
    edges = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    heads = (SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads)
    flat = [torch.randn(int(edges[-1]), h, 64, dtype=torch.bfloat16, requires_grad=True) for h in heads]
    padded = [torch.randn(count, h, longest, 64, dtype=torch.bfloat16, requires_grad=True) for h in heads]
    real = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    mask = (real[:, None, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril()) | torch.eye(
        longest, dtype=torch.bool
    )

    def ours() -> Any:
        out = varlen_attention(*flat, edges, 0.125)
        return torch.autograd.grad(out, flat, torch.ones_like(out))

    def reference() -> Any:
        out = F.scaled_dot_product_attention(*padded, attn_mask=mask, enable_gqa=True)
        return torch.autograd.grad(out, padded, torch.ones_like(out))

    return Sides(ours, reference)


def lora_layer() -> Sides:
    """A decoder layer with LoRA on all linear layers under autocast: fused, and as transformers and PEFT have it."""
    edges = torch.tensor([0, 256, 512], dtype=torch.int32)
    positions = torch.arange(512)[None] % 256

    def side(fused: bool) -> Callable[[], Any]:
        model = gpu_model.build(SHAPE._replace(vocabulary=8), 1, torch.device("cpu"), attention.NAME)
        if fused:
            fuse(model)
        decoder = model.get_base_model().model
        trained = [p for p in model.parameters() if p.requires_grad]
        hidden = torch.randn(1, 512, SHAPE.hidden, dtype=torch.bfloat16, requires_grad=True)
        angles = decoder.rotary_emb(hidden, position_ids=positions)

        def run() -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                out = decoder.layers[0](hidden, position_embeddings=angles, cu_seq_lens_q=edges, cu_seq_lens_k=edges)
            out = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(out, [hidden, *trained], torch.ones_like(out))

        return run

    attention.register()
    return Sides(side(True), side(False))


def step() -> Sides:
    """Forward and backward of four layers with LoRA: a flat row, and a padded batch of transformers and PEFT."""
    lengths = LENGTHS[:6]
    samples = [torch.randint(SHAPE.vocabulary, (length,)).tolist() for length in lengths]
    attention.register()
    ours, theirs = (gpu_model.build(SHAPE, 4, torch.device("cpu"), name) for name in (attention.NAME, "sdpa"))
    fuse(ours)
    batch = flat_row(samples)
    for start, length in zip(batch.cu_seqlens[:-1].tolist(), lengths, strict=True):
        batch.labels[0, start : start + int(length * (1 - TRAINED))] = -100
    objective = Objective(ours)

    def engine() -> None:
        _backward(lambda: objective(batch) / sum(lengths))

    return Sides(engine, lambda: _backward(lambda: theirs(**_padded(samples), use_cache=False).loss))


def _padded(samples: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, samples))
    ids = torch.tensor([sample + [0] * (longest - len(sample)) for sample in samples])
    mask = torch.tensor([[1] * len(sample) + [0] * (longest - len(sample)) for sample in samples])
    prompt = torch.arange(longest) < (mask.sum(1, keepdim=True) * (1 - TRAINED)).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | prompt, -100)}


def _backward(loss: Callable[[], Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        value = loss()
    value.backward()


def checkpoint() -> Sides:
    """An adapter with AdamW's state written as a checkpoint, and the same tensors by torch.save, both to disk."""
    model = gpu_model.build(SHAPE._replace(vocabulary=256), 16, torch.device("cpu"), "sdpa")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    folder = tempfile.TemporaryDirectory()
    tokenizer = _Tokenizer()

    def ours() -> Any:
        return save_checkpoint(Path(folder.name), TrainingState(step=1), model, tokenizer, optimizer, scheduler)

    def reference() -> None:
        torch.save({"model": trained, "optimizer": optimizer.state_dict()}, Path(folder.name, "reference.pt"))

    return Sides(ours, reference, content=3 * sum(p.nbytes for p in trained))


class _Tokenizer:
    """Writes nothing: a tokenizer's files are copied, not what is measured."""

    def save_pretrained(self, folder: Path) -> None: ...


CASES: dict[str, Callable[[], Sides]] = {
    "loss": loss,
    "attention": packed_attention,
    "lora_layer": lora_layer,
    "step": step,
    "checkpoint": checkpoint,
}
