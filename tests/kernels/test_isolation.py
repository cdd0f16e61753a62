"""No packed sample sees another, to the last bit, whatever computes the attention.

The Triton kernels are held to the same in `interpreted_attention.py`, the operation alone in `test_attention.py`.
Libraries that run on a GPU only (varlen_attn, flash-attention) are held to it by `benchmarks/gpu.py`, on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llamahome.model import attention
from llamahome.model.fuse import fuse
from llamahome.training.objective import decode, flat_row

SAMPLES = [[5, 6, 7, 8, 9, 10, 11], [9, 10, 11, 12, 13], [12, 13, 14, 15, 16, 17, 18, 19, 20]]
MIDDLE = slice(7, 12)


class Shifted(nn.Module):
    """An embedding that can be moved by `shift` [T, h], whose gradient is that of each token's own input."""

    def __init__(self, embedding: nn.Embedding, shift: torch.Tensor) -> None:
        super().__init__()
        self.embedding, self.shift = embedding, shift

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.embedding(ids) + self.shift
        return embedded


def build(implementation, dtype, window):
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    attention.register()
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": implementation,
    }  # fmt: skip
    torch.manual_seed(0)
    if window:
        return MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)).to(dtype)
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)


def run(model, dtype, change):
    """Hidden states of the row and the gradients of its tokens' inputs."""
    batch = flat_row(SAMPLES)
    shift = torch.zeros(1, batch.num_tokens, 32, dtype=dtype)
    shift[:, MIDDLE] += change
    shift.requires_grad_()
    embedding = model.get_input_embeddings()
    model.set_input_embeddings(Shifted(embedding, shift))
    try:
        hidden = decode(model, batch)
    finally:
        model.set_input_embeddings(embedding)
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden).to(dtype)
    (grad,) = torch.autograd.grad((hidden * weights).sum(), shift)
    return hidden.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("implementation", [attention.NAME, "sdpa", "eager"])
def test_a_changed_sample_leaves_every_bit_of_the_others(implementation, fused, window, dtype):
    model = build(implementation, dtype, window)
    if fused:
        assert len(fuse(model).swapped) == 2
    for before, after in zip(run(model, dtype, 0.0), run(model, dtype, 0.5), strict=True):
        for kept in (slice(0, MIDDLE.start), slice(MIDDLE.stop, None)):
            assert torch.equal(before[:, kept], after[:, kept])
        assert not torch.isclose(before[:, MIDDLE].float(), after[:, MIDDLE].float(), rtol=1e-2, atol=1e-4).all()
