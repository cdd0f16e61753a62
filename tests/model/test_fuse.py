"""Fused decoder layers equal transformers' own, per architecture; what does not fit is left alone and named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import llamahome
from llamahome.model import attention
from llamahome.model.compile import decoder_layers
from llamahome.model.fuse import fuse

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 4},
    "Phi3": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Olmo": {},
    "Olmo2": {},
}
LENGTHS = (7, 5)


def build(name, **more):
    import transformers

    attention.register()
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    settings = {**SIZES, **ARCHITECTURES.get(name, {}), "attn_implementation": attention.NAME, **more}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**settings)).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which hide a mistake
            parameter.data += torch.randn_like(parameter) * 0.2
    return model.train()


def adapted(model, **settings):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(model, config).double()


def results(model):
    """The logits of two packed samples and all gradients, from one random state."""
    model.zero_grad()
    torch.manual_seed(3)
    ids = torch.randint(1, 64, (1, sum(LENGTHS)))
    bounds = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    logits = model(
        input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False
    ).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_near(found, expected, bound):
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm().clamp_min(1e-6)) < bound


@pytest.mark.parametrize("lora", [None, 0.0, 0.2], ids=["full", "lora", "dropout"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_stay_and_undo_gives_every_bit_back(name, lora):
    model = build(name) if lora is None else adapted(build(name), lora_dropout=lora)
    keys, expected = list(model.state_dict()), results(model)
    report = fuse(model)
    assert len(report.swapped) == 2
    assert all("Norm has no fused path" in reason and name.startswith("Olmo") for reason in report.kept.values())
    assert len(report.kept) == {"Olmo": 4, "Olmo2": 8}.get(name, 0)
    # The norms of transformers compute in fp32 whatever the model's type; those of the Olmos are called as they are.
    assert_near(results(model), expected, 1e-12 if name.startswith("Olmo") else 1e-5)
    assert list(model.state_dict()) == keys
    report.undo()
    assert all(torch.equal(one, other) for one, other in zip(results(model), expected, strict=True))
    assert not report.swapped


def test_recomputing_gate_and_up_changes_no_bit():
    model = adapted(build("Llama"))
    report = fuse(model)
    expected = results(model)
    report.undo()
    fuse(model, recompute_mlp=True)
    assert all(torch.equal(one, other) for one, other in zip(results(model), expected, strict=True))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"use_dora": True}, "Dora"), ({"lora_bias": True}, "Linear has no fused path")],
    ids=["dora", "bias"],
)
def test_an_adapter_without_a_fused_path_runs_as_it_is(settings, reason):
    model = adapted(build("Llama"), **settings)
    expected = results(model)
    report = fuse(model)
    assert len(report.kept) == 14  # projections
    assert all(reason in text for text in report.kept.values())
    assert_near(results(model), expected, 1e-5)


def test_only_some_projections_adapted():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        build("Llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    ).double()
    expected = results(model)
    assert not fuse(model).kept
    assert_near(results(model), expected, 1e-5)


def test_layers_in_4_bits_are_fused():
    """QLoRA: bitsandbytes' layers with PEFT's adapters, against their own forward in fp32."""
    bnb = pytest.importorskip("bitsandbytes")
    model = build("Llama", hidden_size=64, intermediate_size=128).float()  # its rows end with a block, see nf4.py
    for name, module in list(model.model.layers.named_modules()):
        if type(module) is nn.Linear:
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(module.weight.detach(), quant_type="nf4", module=packed)._quantize("cpu")
            model.model.layers.set_submodule(name, packed)
    model = adapted(model).float()
    before = results(model)
    report = fuse(model)
    assert not report.kept
    for ours, theirs in zip(results(model), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_adapter_can_be_disabled_and_merged_afterwards():
    model = adapted(build("Llama"))
    ids = torch.arange(1, 9)[None]

    def logits():
        with torch.no_grad():
            adapter = model(input_ids=ids, use_cache=False).logits
            with model.disable_adapter():
                return adapter, model(input_ids=ids, use_cache=False).logits

    expected = logits()
    fuse(model)
    assert_near(logits(), expected, 1e-5)
    model.merge_adapter()
    assert_near(logits(), expected, 1e-5)


def test_generation_with_a_cache_gives_the_same_tokens():
    model = adapted(build("Llama", attn_implementation="sdpa")).eval()
    ids = torch.arange(1, 9)[None]
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    fuse(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), expected)


def test_another_instance_of_the_class_is_untouched():
    one, other = build("Llama"), build("Llama")
    fuse(one)
    assert all("forward" in vars(layer) for layer in decoder_layers(one))
    assert not any("forward" in vars(layer) for layer in decoder_layers(other))


def test_a_copy_of_a_fused_model_is_a_model_of_its_own():
    model = build("Llama")
    fuse(model)
    twin = copy.deepcopy(model)
    expected = results(twin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(one, other) for one, other in zip(results(twin), expected, strict=True))


def test_what_does_not_fit_is_kept_and_named():
    model = build("Olmo", clip_qkv=1.0)
    decoder_layers(model)[1].mlp.register_forward_hook(lambda *_: None)
    report = fuse(model)
    assert report.swapped == []
    assert report.kept == {
        "model.layers.0": "its queries, keys and values are clipped",
        "model.layers.1": "a OlmoMLP in it has hooks",
    }
    unknown = fuse(build("StableLm"))
    assert unknown.summary() == "0 layers fused; not all: StableLmDecoderLayer is not known"
    model = build("Llama")
    fuse(model)
    assert set(fuse(model).kept.values()) == {"its forward is replaced already"}


def test_checkpointed_layers_keep_less_and_give_the_same_gradients():
    model = adapted(build("Llama"), lora_dropout=0.2)
    fuse(model)
    kept = [0, 0]

    def counted(which):
        def pack(tensor):
            kept[which] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return results(model)

    expected = counted(0)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_near(counted(1), expected, 1e-12)
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("recompute", [False, True])
def test_a_llama_layer_keeps_what_the_formula_says(recompute):
    """8h + 4f + 4kv + 4hq + 14r + 8 bytes per token in bf16, to the byte; 4f less where gate and up are made again."""
    h, f, hq, kv, rank, tokens = 64, 96, 4, 32, 8, 48
    from peft import LoraConfig, get_peft_model

    model = build("Llama", hidden_size=h, intermediate_size=f, num_key_value_heads=2).bfloat16()
    model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    fuse(model, recompute_mlp=recompute)
    decoder = model.get_base_model().model
    hidden = torch.randn(1, tokens, h, dtype=torch.bfloat16, requires_grad=True)
    angles = decoder.rotary_emb(hidden, position_ids=torch.arange(tokens)[None])
    bounds = torch.tensor([0, 20, tokens], dtype=torch.int32)
    constant = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *angles, bounds)}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in constant:
            kept[address] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        decoder.layers[0](hidden, position_embeddings=angles, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    expected = 8 * h + 4 * f * (not recompute) + 4 * kv + 4 * hq + 14 * rank + 8
    assert sum(size for size, _ in kept.values()) == expected * tokens


def test_the_public_name():
    model = build("Llama")
    assert len(llamahome.fuse(model).swapped) == 2
    assert isinstance(model, nn.Module)
