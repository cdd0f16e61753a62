"""The plan's parts, each recomputed here from the model's own tensors or from the method's definition."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llamahome.memory.layers import Adapter
from llamahome.memory.plan import MemoryPlan, plan_memory
from llamahome.memory.shape import model_shape

H, F, LAYERS, HEADS, KV_HEADS, VOCABULARY, RANK = 4096, 14336, 32, 32, 8, 128_256, 16
KV = H * KV_HEADS // HEADS
LLAMA_8B = {
    "model_type": "llama", "hidden_size": H, "intermediate_size": F, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}  # fmt: skip
LINEAR = LAYERS * (2 * H * H + 2 * H * KV + 3 * H * F)
OTHER = 2 * VOCABULARY * H + (2 * LAYERS + 1) * H
ADAPTER = LAYERS * RANK * (2 * (H + H) + 2 * (H + KV) + 3 * (H + F))


def plan(**settings: Any) -> MemoryPlan:
    return plan_memory(LLAMA_8B, **{"device": "cuda", "fused": True, "lora": Adapter(rank=RANK)} | settings)


def test_lora_holds_frozen_weights_in_two_bytes_and_adapters_in_four_with_a_copy() -> None:
    found = plan()
    assert LINEAR + OTHER == 8_030_261_248
    assert found.weights == 2 * (LINEAR + OTHER)
    assert (found.adapters, found.gradients, found.optimizer) == (6 * ADAPTER, 4 * ADAPTER, 8 * ADAPTER)


def test_full_training_is_sixteen_bytes_for_each_weight() -> None:
    found = plan(method="full")
    assert found.weights + found.gradients + found.optimizer == 16 * (LINEAR + OTHER)


def test_nf4_is_four_bits_and_a_scale_quantised_twice() -> None:
    blocks = LINEAR // 64
    packed, scales, scales_of_scales = LINEAR // 2, blocks, 4 * blocks // 256
    assert plan(method="qlora").weights == pytest.approx(packed + scales + scales_of_scales + 2 * OTHER, rel=1e-9)
    assert 8 * (scales + scales_of_scales) / LINEAR == pytest.approx(0.127, abs=1e-3)  # bits, as QLoRA's paper says
    assert plan(method="qlora", precision="fp32").weights - plan(method="qlora").weights == 2 * OTHER


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"), [("adamw", 8), ("sgd", 4), ("adafactor", 0), ("adamw8bit", 2 + 2 * 4 / 256)]
)
def test_an_optimizers_state_is_its_moments(optimizer: str, bytes_each: float) -> None:
    trained = LINEAR + OTHER
    assert plan(method="full", optimizer=optimizer).optimizer == pytest.approx(bytes_each * trained, rel=1e-9)


@pytest.mark.parametrize(("reshard", "layers"), [(True, 2), (False, LAYERS)])
def test_a_rank_of_four_holds_its_quarter_and_the_units_at_work(reshard: bool, layers: int) -> None:
    one, four = plan(), plan(ranks=4, reshard=reshard)
    assert (four.weights, four.optimizer) == (one.weights // 4, one.optimizer // 4)
    buffer, gradient = 2 * LINEAR // LAYERS, (2 + 4) * LINEAR // LAYERS  # of one unit; the gradient's sum is in fp32
    assert (one.gathered, four.gathered) == (0, 2 * OTHER + layers * 2 * LINEAR // LAYERS + buffer)
    full = plan(method="full", ranks=4, reshard=reshard)
    assert full.gathered - four.gathered == gradient - buffer


def test_a_fused_layer_keeps_inputs_and_products_once() -> None:
    """bf16: both norms' inputs, q and attention's output, k and v, gate and up, seven x A; in fp32 two rms, one lse."""
    kept = 2 * (2 * H + 2 * H + 2 * KV + 2 * F + 7 * RANK) + 4 * HEADS + 2 * 4
    assert (plan().saved_per_token - _ends()) / LAYERS == kept
    remade = plan(recompute_mlp=True)
    assert (remade.saved_per_token - _ends()) / LAYERS == kept - 2 * 2 * F
    assert remade.backward_per_token == plan().backward_per_token + 2 * 2 * F  # one layer's, made again
    layer = plan(gradient_checkpointing=True)
    assert (layer.saved_per_token - _ends()) / LAYERS == 2 * H
    assert layer.backward_per_token == plan().backward_per_token + kept - 2 * H


def _ends() -> int:
    """Embedding and last norm in fp32 and bf16, rotary tables, a trained token's state and its gradient."""
    return 8 * H + 2 * 2 * (H // HEADS) + 2 * 2 * H


@pytest.mark.parametrize("tokens", [100, 5000])
def test_the_loss_holds_two_chunks_of_logits(tokens: int) -> None:
    rows = min(tokens, math.floor(512 * 2**20 / (2 * VOCABULARY) / 256) * 256)
    assert plan(micro_batch_tokens=tokens).loss == 2 * rows * VOCABULARY * 2
    assert plan(micro_batch_tokens=tokens, loss_chunk=64).loss == 2 * 64 * VOCABULARY * 2


def test_moved_activations_leave_two_layers() -> None:
    per_layer = (plan().saved_per_token - _ends()) // LAYERS
    assert plan(offload=True).saved_per_token - _ends() == 2 * per_layer


def test_the_widths_are_the_models() -> None:
    assert model_shape(LLAMA_8B).projections["k_proj"] == (H, KV)
