"""Adapters start from the seed alone, fit the model or say why not, and are what PEFT makes of the same settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamahome.config import Config, ModelSettings
from llamahome.errors import ConfigError, ModelError
from llamahome.model.adapters import (
    adapter_state,
    apply_adapter,
    check_adapter_matches,
    enable_checkpointing,
    read_adapter,
    trainable_parameters,
)
from llamahome.model.export import save_model
from llamahome.model.load import load_model, load_tokenizer, load_trained, resolve_model

IDS = torch.arange(3, 35)[None]


def base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(resolve_model(str(folder), ModelSettings()), dtype=dtype, device="cpu", attention="sdpa")


def adapted(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    settings = {"lora.rank": 4, **{key.replace("__", "."): value for key, value in overrides.items()}}
    return apply_adapter(base(folder, dtype), Config.load(None, settings))


def trained(folder: Path, **overrides: Any) -> Any:
    """An adapter as if it had been trained: every value moved by noise."""
    model = adapted(folder, **overrides)
    generator = torch.Generator().manual_seed(7)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_first_values_depend_on_the_seed_alone(tiny_model_dir: Path, use_dora: bool) -> None:
    torch.manual_seed(1)
    first = adapter_state(adapted(tiny_model_dir, lora__use_dora=use_dora))
    torch.manual_seed(2)
    torch.rand(5)
    before = torch.get_rng_state()
    second = adapter_state(adapted(tiny_model_dir, lora__use_dora=use_dora))
    assert same(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(first, adapter_state(adapted(tiny_model_dir, training__seed=43, lora__use_dora=use_dora)))


def test_all_linear_is_every_linear_layer_but_the_head(tiny_model_dir: Path) -> None:
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_state(adapted(tiny_model_dir))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("use_dora", [False, True])
def test_only_the_adapter_is_trained_and_in_fp32_over_a_bf16_base(tiny_model_dir: Path, use_dora: bool) -> None:
    model = adapted(tiny_model_dir, torch.bfloat16, lora__use_dora=use_dora)
    pairs = trainable_parameters(model)
    assert pairs
    assert all(parameter.dtype == torch.float32 for _, parameter in pairs)
    assert all("lora_" in name for name, _ in pairs)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert [name for name, _ in pairs] == [name for name, p in model.named_parameters() if p.requires_grad]


def test_full_trains_every_weight_once(tiny_model_dir: Path) -> None:
    model = adapted(tiny_model_dir, training__method="full")
    names = [name for name, _ in trainable_parameters(model)]
    assert len(names) == len(set(names)) == len(load_file(tiny_model_dir / "model.safetensors"))
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 32 / 4), ({"lora__use_rslora": True}, 32 / 2), ({"lora__alpha": 4}, 1.0)],
    ids=["lora", "rslora", "alpha"],
)
def test_the_update_is_scale_times_b_a(tiny_model_dir: Path, settings: dict[str, Any], scale: float) -> None:
    model = trained(tiny_model_dir, lora__target_modules=["q_proj"], **settings)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + scale * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x), expected)


def test_dora_scales_the_direction_to_its_magnitude(tiny_model_dir: Path) -> None:
    model = trained(tiny_model_dir, lora__target_modules=["up_proj"], lora__use_dora=True)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    weight = layer.base_layer.weight + 8 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ (weight * (magnitude / weight.norm(dim=1))[:, None]).T)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], "no layer of the model is called 'q_porj'; lora.target_modules; did you mean q_proj"),
        (["q_proj", "wv"], "no layer of the model is called 'wv'"),
        (["mlp"], "no layer of the model is called 'mlp'"),
        (["zzz"], "did you mean down_proj, embed_tokens, gate_proj, k_proj, lm_head"),
    ],
)
def test_target_modules_that_match_nothing(tiny_model_dir: Path, targets: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(tiny_model_dir, lora__target_modules=targets)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_target_may_be_a_part_of_the_path(tiny_model_dir: Path) -> None:
    state = adapter_state(adapted(tiny_model_dir, lora__target_modules=["self_attn.q_proj", "layers.1.mlp.up_proj"]))
    assert len(state) == 2 * (2 + 1)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointing_gives_the_same_gradients(tiny_model_dir: Path, method: str) -> None:
    gradients = []
    for layers, marks in ((False, [False, False]), (True, [True, True]), (1, [True, False])):
        model = trained(tiny_model_dir, training__method=method).train()
        if layers:
            enable_checkpointing(model, layers)
        assert [layer.gradient_checkpointing for layer in model.base_model.modules() if is_layer(layer)] == marks
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trainable_parameters(model)})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert same(gradients[0], gradients[1])
    assert same(gradients[0], gradients[2])


def is_layer(module: Any) -> bool:
    return type(module).__name__ == "LlamaDecoderLayer"


def test_weights_are_read_back_bit_for_bit(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = trained(tiny_model_dir, lora__use_dora=True)
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    other = adapted(tiny_model_dir, lora__use_dora=True)
    read_adapter(other, tmp_path / "adapter")
    assert same(adapter_state(model), adapter_state(other))
    assert len(trainable_parameters(other)) == len(trainable_parameters(model))


def wider(folder: Path) -> None:
    """A base with another MLP width."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size = 96
    LlamaForCausalLM(config).save_pretrained(folder)


def shallower(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    state = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if ".layers.1." not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, "down_proj.lora_A.weight is [4, 128] instead of [4, 96]"),
        (shallower, "model.layers.1.mlp.down_proj.lora_A.weight has no place in the model"),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_an_adapter_of_another_base_is_refused(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path, change: Any, message: str, recorded: bool
) -> None:
    save_model(trained(tiny_model_dir), tiny_tokenizer, tmp_path / "adapter")
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    change(other)
    if not recorded:
        (tmp_path / "adapter" / "llamahome.json").unlink()
    with pytest.raises(ModelError) as caught:
        check_adapter_matches(adapted(other), tmp_path / "adapter")
    assert ("trained on another base" if recorded else message) in str(caught.value)
    assert caught.value.exit_code == 4


def test_an_adapter_with_other_settings_is_refused(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_model(trained(tiny_model_dir), tiny_tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"is \[4, 128\] instead of \[8, 128\]"):
        check_adapter_matches(adapted(tiny_model_dir, lora__rank=8), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"has no place in the model.* and \d+ more"):
        check_adapter_matches(adapted(tiny_model_dir, lora__target_modules=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(ModelError, match="lora_magnitude_vector is missing"):
        check_adapter_matches(adapted(tiny_model_dir, lora__use_dora=True), tmp_path / "adapter")


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


DAMAGE = {
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"123"), "damaged weight file"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no weights (adapter_model.safetensors)"),
    "a pickle": (pickled, "the weights are pickles"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "no valid JSON"),
    "another kind": (lambda f: edit(f / "adapter_config.json", peft_type="IA3"), "an adapter of the type 'IA3'"),
    "matches nothing": (lambda f: edit(f / "adapter_config.json", target_modules=["x"]), "does not fit the model"),
    "wrong type": (lambda f: edit(f / "adapter_config.json", r="many"), "does not fit the model"),
    "base is gone": (
        lambda f: (edit(f / "adapter_config.json", base_model_name_or_path="/gone"), (f / "llamahome.json").unlink()),
        "no such model folder or file; /gone",
    ),
    "no base": (
        lambda f: (edit(f / "adapter_config.json", base_model_name_or_path=None), (f / "llamahome.json").unlink()),
        "names no base model",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_adapter_is_one_line_and_code_4(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "adapter"
    save_model(trained(tiny_model_dir), tiny_tokenizer, folder)
    damage, expected = DAMAGE[name]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_trained(folder, ModelSettings(), dtype=torch.float32, device="cpu", attention="sdpa")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_load_trained_puts_the_adapter_on_its_base(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = trained(tiny_model_dir).eval()
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    state = torch.get_rng_state()
    loaded, tokenizer = load_trained(
        tmp_path / "adapter", ModelSettings(), dtype=torch.float32, device="cpu", attention="sdpa"
    )
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not trainable_parameters(loaded)
    assert not loaded.training
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert torch.equal(torch.get_rng_state(), state)


def test_a_base_that_moved_is_found_by_name(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    first = Path(shutil.copytree(tiny_model_dir, tmp_path / "first"))
    save_model(trained(first), load_tokenizer(resolve_model(str(first), ModelSettings())), tmp_path / "adapter")
    first.rename(tmp_path / "second")
    settings = ModelSettings(name=str(tmp_path / "second"))
    load_trained(tmp_path / "adapter", settings, dtype=torch.float32, device="cpu", attention="sdpa")


def test_what_llamahome_recorded_stands_in_for_a_cache_that_was_cleared(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    save_model(trained(tiny_model_dir), tiny_tokenizer, tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="/cleared/cache/model")
    load_trained(tmp_path / "adapter", ModelSettings(), dtype=torch.float32, device="cpu", attention="sdpa")
