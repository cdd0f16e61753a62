"""Fused layers of every known architecture, their Triton kernels in the interpreter, against transformers' own.

What absorbs an adapter is counted: rope turns queries and keys (not where they have norms of their own, or come out of
one matrix), the norm before the MLP adds attention's output (not where that has a norm of its own: there it adds the
two branches), the gated unit adds gate's and up's.
"""

from __future__ import annotations

import pytest
import torch
from against_float64 import error

from llamahome.kernels import mlp_triton, norm_lora_triton, norm_triton, rope_triton
from llamahome.model import attention
from llamahome.model.fuse import fuse

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MLP_ONLY = (0, 0, 1, 0)  # times that rope, norm and gated unit absorb in a layer, and that a norm adds plainly
ARCHITECTURES = {
    "Llama": ({}, (2, 1, 1, 0)),
    "Mistral": ({"sliding_window": 4}, (2, 1, 1, 0)),
    "Qwen2": ({}, (2, 1, 1, 0)),
    "Qwen3": ({"head_dim": 16}, (0, 1, 1, 0)),
    "Gemma2": ({"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}, (2, 0, 1, 1)),
    "Gemma3": ({"head_dim": 16, "sliding_window": 4}, (0, 0, 1, 1)),
    "Phi3": ({}, (0, 1, 0, 0)),
    "SmolLM3": ({"no_rope_layers": [1]}, (2, 1, 1, 0)),
    "Olmo": ({}, (2, 0, 1, 0)),
    "Olmo2": ({}, MLP_ONLY),
}


def _build(name, more):
    import transformers
    from peft import LoraConfig, get_peft_model

    attention.register()
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**SIZES, **more, attn_implementation=attention.NAME))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.train()


def _results(model):
    """The logits of two packed samples and the adapters' gradients."""
    model.zero_grad()
    ids = torch.randint(1, 32, (1, 12), generator=torch.Generator().manual_seed(3))
    bounds = torch.tensor([0, 7, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    logits = model(
        input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False
    ).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _counted(monkeypatch, module, name, counts):
    calls = []
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: (counts(given) and calls.append(None)) or real(*given))
    return calls


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fused_layer_equals_transformers_own(name, monkeypatch):
    more, expected = ARCHITECTURES[name]
    model = _build(name, more)
    own = _results(model)
    exact = _results(_build(name, more).double())
    counters = [
        _counted(monkeypatch, rope_triton, "apply_with_update", lambda _: True),
        _counted(monkeypatch, norm_lora_triton, "forward", lambda _: True),
        _counted(monkeypatch, mlp_triton, "forward", lambda given: given[3] is not None),
        _counted(monkeypatch, norm_triton, "forward", lambda given: given[4] is not None),
    ]
    assert len(fuse(model).swapped) == 1
    fused = _results(model)
    assert tuple(map(len, counters)) == expected
    for ours, theirs, truth in zip(fused, own, exact, strict=True):
        # Some twenty products and norms in fp32 one after the other; transformers' own norms are fp32 in float64, too.
        assert error(ours, truth) <= max(5e-6, 2 * error(theirs, truth))
