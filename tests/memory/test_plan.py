"""The plan's formulas against what PyTorch really allocates and keeps, and its own arithmetic."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest

from llamahome.errors import ModelError
from llamahome.memory.plan import Adapter, plan_memory
from llamahome.memory.shape import model_shape

SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
TINY = SMOLLM2 | {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "head_dim": 8,
}  # fmt: skip
TARGETS = [["q_proj", "v_proj"], ["gate_proj", "down_proj"], ["o_proj"]]


def llama(layers: int, method: str, precision: str, adapter: Adapter, checkpointing: bool) -> Any:
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    config = LlamaConfig(**{**TINY, "num_hidden_layers": layers}, attn_implementation="sdpa")
    model: Any = LlamaForCausalLM(config)
    if method == "lora":
        model = model.to(torch.bfloat16) if precision == "bf16" else model
        targets = adapter.target_modules
        settings = peft.LoraConfig(r=adapter.rank, lora_dropout=adapter.dropout,
                                   target_modules=targets if isinstance(targets, str) else list(targets))  # fmt: skip
        model = peft.get_peft_model(model, settings)
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def kept_bytes(model: Any, tokens: int, precision: str) -> int:
    """Bytes of distinct storages that autograd keeps for one row of tokens, weights aside."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    decoder = (model.get_base_model() if hasattr(model, "peft_config") else model).model
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        decoder(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    return sum(kept.values())


FORMATS = [(method, precision) for method in ("lora", "full") for precision in ("bf16", "fp32")]
CASES = [(*kind, Adapter(rank=8), checkpointing) for kind in FORMATS for checkpointing in (False, True)]
CASES += [("lora", precision, Adapter(rank=8, dropout=0.1), False) for precision in ("bf16", "fp32")]
CASES += [("lora", "bf16", Adapter(rank=4, target_modules=TARGETS[0]), False)]
CASES += [("lora", "fp32", Adapter(rank=4, target_modules=names), False) for names in TARGETS]


@pytest.mark.parametrize(("method", "precision", "adapter", "checkpointing"), CASES)
def test_kept_bytes_per_layer_and_token_are_exact(
    method: Any, precision: str, adapter: Adapter, checkpointing: bool
) -> None:
    pytest.importorskip("peft")
    measured, planned = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layers in (2, 3):
            model = llama(layers, method, precision, adapter, checkpointing)
            measured.append(kept_bytes(model, 96, precision) - kept_bytes(model, 32, precision))
            config = TINY | {"num_hidden_layers": layers}
            planned.append(plan_memory(config, method=method, precision=precision, lora=adapter,
                                       gradient_checkpointing=checkpointing).saved_per_token)  # fmt: skip
    assert (measured[1] - measured[0]) / 64 == planned[1] - planned[0]


@pytest.mark.parametrize("adapter", [Adapter(), Adapter(rank=4, target_modules=["q_proj", "down_proj"])])
def test_weights_and_adapters_are_counted_exactly(adapter: Adapter) -> None:
    pytest.importorskip("peft")
    model = llama(2, "lora", "bf16", adapter, checkpointing=False)
    config = TINY | {"num_hidden_layers": 2}
    plan = plan_memory(config, lora=adapter)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.weights == 2 * frozen
    assert (plan.adapters, plan.gradients, plan.optimizer) == (6 * trained, 4 * trained, 8 * trained)
    full = plan_memory(config, method="full")
    assert (full.weights, full.gradients, full.optimizer) == (4 * frozen, 4 * frozen, 8 * frozen)


def test_published_sizes() -> None:
    shape = model_shape(SMOLLM2)
    assert shape.linear_parameters + shape.other_parameters == 134_515_008
    llama3 = SMOLLM2 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
                        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
    shape = model_shape(llama3)
    assert shape.linear_parameters + shape.other_parameters == 8_030_261_248
    assert plan_memory(llama3, method="qlora").weights < 0.4 * plan_memory(llama3).weights


def test_a_transformers_config_gives_the_same_as_its_json() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SMOLLM2)
    assert plan_memory(config) == plan_memory(SMOLLM2) == plan_memory({"text_config": SMOLLM2})


def test_the_loss_chunk_is_the_kernels() -> None:
    kernels = pytest.importorskip("llamahome.kernels.loss")
    for vocabulary in (512, 32_000, 49_152, 128_256, 262_144):
        assert plan_memory(SMOLLM2 | {"vocab_size": vocabulary}).loss_rows == kernels.chunk_rows_for(vocabulary)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_total_is_its_parts_and_rises_with_tokens(checkpointing: bool) -> None:
    plan = plan_memory(SMOLLM2, gradient_checkpointing=checkpointing)
    parts = plan.to_dict()
    names = ("weights", "adapters", "gradients", "optimizer", "activations", "loss", "allocator", "overhead")
    assert sum(parts[name] for name in names) == plan.total == parts["total"]
    totals = [plan.at(tokens).total for tokens in range(64, 4096, 64)]
    assert totals == sorted(totals)
    assert math.isclose(plan.at(40_000).total - plan.at(20_000).total, 20_000 * plan.bytes_per_token, rel_tol=1e-3)


@pytest.mark.parametrize("limit", [1.5e9, 3e9, 10e9])
def test_max_tokens_is_the_last_that_fits(limit: float) -> None:
    plan = plan_memory(SMOLLM2)
    most = plan.max_tokens(limit)
    assert plan.at(most).total <= limit < plan.at(most + 1).total


def test_nothing_fits_below_the_fixed_part() -> None:
    plan = plan_memory(SMOLLM2)
    assert plan.max_tokens(plan.fixed_bytes - 1) == 0


def test_what_saves_memory_saves_it() -> None:
    def total(**settings: Any) -> int:
        return plan_memory(SMOLLM2, micro_batch_tokens=2048, **settings).total

    assert total(gradient_checkpointing=True) < total()
    assert total() < total(precision="fp32")
    assert total() < total(method="full")
    assert total(optimizer="sgd", method="full") < total(method="full")
    assert total(trained_fraction=0.1) <= total()
    assert total(lora=Adapter(rank=4)) < total(lora=Adapter(rank=64))
    assert total(loss_chunk=64) < total(loss_chunk=2048)


# Resident peaks of runs of fused layers on Linux x86 with glibc 2.36: model, method, precision, what is computed again,
# tokens in a micro-batch, MB. `benchmarks/governor.py --plans` measures them anew.
MEASURED = [
    ("smollm2", "lora", "bf16", "none", 512, 1266), ("smollm2", "lora", "bf16", "none", 1024, 1516),
    ("smollm2", "lora", "bf16", "layers", 1024, 1197), ("smollm2", "lora", "bf16", "mlp", 512, 1141),
    ("smollm2", "lora", "fp32", "none", 256, 1559), ("smollm2", "lora", "fp32", "layers", 512, 1445),
    ("smollm2", "full", "bf16", "none", 256, 3323), ("smollm2", "full", "fp32", "layers", 256, 3197),
    ("small", "lora", "bf16", "none", 2048, 791), ("small", "lora", "fp32", "none", 2048, 866),
    ("small", "full", "bf16", "none", 2048, 1130), ("small", "full", "bf16", "layers", 4096, 1087),
]  # fmt: skip


@pytest.mark.parametrize(("model", "method", "precision", "again", "tokens", "megabytes"), MEASURED)
def test_plan_is_near_what_was_measured(
    model: str, method: Any, precision: str, again: str, tokens: int, megabytes: int
) -> None:
    small = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4}  # fmt: skip
    plan = plan_memory(
        SMOLLM2 | small if model == "small" else SMOLLM2, method=method, precision=precision, micro_batch_tokens=tokens,
        gradient_checkpointing=again == "layers", recompute_mlp=again == "mlp", step_tokens=2 * tokens, fused=True,
    )  # fmt: skip
    assert plan.total / 1e6 == pytest.approx(megabytes, rel=0.1)


@pytest.mark.parametrize("config", [{}, {"model_type": "t5", "d_model": 512}, SMOLLM2 | {"vocab_size": None}])
def test_a_configuration_that_is_no_decoders_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="is missing in the configuration of a model of type"):
        plan_memory(config)


def test_other_architectures_have_a_plan() -> None:
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "vocab_size": 50257,
        "tie_word_embeddings": True,
    }
    mixtral = SMOLLM2 | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    shape = model_shape(gpt2)
    assert shape.linear_parameters + shape.other_parameters == pytest.approx(124e6, rel=0.02)
    assert plan_memory(gpt2, lora=Adapter(target_modules=["c_attn"])).adapters > 0
    dense, sparse = model_shape(SMOLLM2), model_shape(mixtral)
    mlp = 3 * 30 * 576 * 1536
    assert sparse.linear_parameters - dense.linear_parameters == 7 * mlp
