"""Bytes that one decoder layer keeps for its backward pass, per token: fused beside transformers + PEFT as they are.

    python benchmarks/saved_bytes.py                 # Llama-3-8B's layer
    python benchmarks/saved_bytes.py --quick         # a small layer

Saved tensors are counted by storage, each once; weights, rotary tables and sample bounds do not count. The last line
of stdout is a JSON object: `ratio_peft` is the fused layer's bytes by those of PEFT's default (adapters in fp32 on
bf16 weights; `peft_autocast_bytes` are those under autocast), `ratio_peft_low` by those of PEFT with adapters in
bf16, `ratio_recompute` is `ratio_peft` with gate and up made again, `formula` whether the fused layer keeps exactly
8h + 4f + 4kv + 4hq + 14r + 8.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from llamahome.model import attention, fuse

TOKENS = 64


def build(sizes: dict[str, int], adapters: torch.dtype) -> tuple[Any, Any]:
    """A one-layer Llama in bf16 with LoRA on all linear layers, and PEFT's wrapper around it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    attention.register()
    config = LlamaConfig(
        vocab_size=8, num_hidden_layers=1, hidden_size=sizes["hidden"], intermediate_size=sizes["mlp"],
        num_attention_heads=sizes["heads"], num_key_value_heads=sizes["key_heads"], attn_implementation=attention.NAME,
    )  # fmt: skip
    causal = LlamaForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(causal, LoraConfig(r=sizes["rank"], target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapters)
    return model.train(), causal


def saved_bytes(model: Any, causal: Any, *, autocast: bool = True) -> float:
    """Bytes per token that the only layer keeps."""
    decoder = causal.model
    hidden = torch.randn(1, TOKENS, causal.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(TOKENS)[None]
    angles = decoder.rotary_emb(hidden, position_ids=positions)
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    constant = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *angles, bounds)}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensors stay alive, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constant:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False),
    ):
        decoder.layers[0](hidden, position_embeddings=angles, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    return sum(size for size, _ in kept.values()) / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="hidden size 256, MLP 896")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("hidden", "mlp", "heads", "key_heads", "rank")}
    if args.quick:
        sizes |= {"hidden": 256, "mlp": 896, "heads": 8, "key_heads": 2}
    key_value = sizes["hidden"] // sizes["heads"] * sizes["key_heads"]
    formula = 8 * sizes["hidden"] + 4 * sizes["mlp"] + 4 * key_value + 4 * sizes["heads"] + 14 * sizes["rank"] + 8
    low = saved_bytes(*build(sizes, torch.bfloat16))
    model, causal = build(sizes, torch.float32)
    default = saved_bytes(model, causal, autocast=False)
    under_autocast = saved_bytes(model, causal)
    report = fuse.fuse(model)
    fused = saved_bytes(model, causal)
    report.undo()
    fuse.fuse(model, recompute_mlp=True)
    recomputed = saved_bytes(model, causal)
    figures = {
        "peft_bytes": default, "peft_autocast_bytes": under_autocast, "peft_low_bytes": low,
        "fused_bytes": fused, "formula_bytes": formula, "formula": fused == formula,
        "ratio_peft": round(fused / default, 3), "ratio_peft_low": round(fused / low, 3),
        "ratio_recompute": round(recomputed / default, 3),
    }  # fmt: skip
    if not args.json:
        for name, value in figures.items():
            print(f"{name:20} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
