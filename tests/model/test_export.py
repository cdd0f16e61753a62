"""What is written loads in plain transformers and PEFT, and a merge is proved or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llamahome.model.export
from llamahome.config import Config, ModelSettings
from llamahome.errors import ModelError, StorageError, UsageError
from llamahome.model.adapters import adapter_state, apply_adapter, trainable_parameters
from llamahome.model.export import merge_adapter, read_weights, save_model, write_model
from llamahome.model.load import load_model, load_tokenizer, resolve_model

IDS = torch.arange(3, 35)[None]
VARIANTS = {"lora": {}, "rslora": {"lora.use_rslora": True}, "dora": {"lora.use_dora": True}}


def load(folder: Path, dtype: torch.dtype = torch.float32, nf4: bool = False) -> Any:
    source = resolve_model(str(folder), ModelSettings())
    return load_model(source, dtype=dtype, device="cpu", attention="sdpa", nf4=nf4)


def trained(folder: Path, settings: dict[str, Any], noise: float = 0.05) -> Any:
    base = load(folder, nf4=settings.get("training.method") == "qlora")
    model = apply_adapter(base, Config.load(None, {"lora.rank": 4, **settings})).eval()
    generator = torch.Generator().manual_seed(7)
    for _, parameter in trainable_parameters(model):
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def families(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return {"llama": tiny_model_dir, "qwen2": folder}


PLAIN_PEFT = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
assert text == "<|im_start|>user\\nhi<|im_end|>\\n" and tokenizer.eos_token == "<|im_end|>", text
with torch.no_grad():
    torch.save(model(torch.arange(3, 35)[None]).logits, sys.argv[2])
assert not any(name.startswith("llamahome") for name in sys.modules)
"""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_adapter_has_the_same_logits_in_peft(
    families: dict[str, Path], tiny_tokenizer: Any, tmp_path: Path, family: str, variant: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = trained(families[family], VARIANTS[variant])
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(families[family]), tmp_path / "adapter")
    assert torch.equal(plain.eval()(IDS).logits, model(IDS).logits)


def test_peft_finds_the_base_and_the_tokenizer_with_no_llamahome_there(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = trained(tiny_model_dir, {})
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    command = [sys.executable, "-c", PLAIN_PEFT, str(tmp_path / "adapter"), str(tmp_path / "logits.pt")]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), model(IDS).logits)


def test_the_files_of_an_adapter(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = trained(tiny_model_dir, {"lora.use_rslora": True, "lora.dropout": 0.1})
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {
        "adapter_config.json", "adapter_model.safetensors", "llamahome.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model_dir)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (4, 32, 0.1, True)
    assert (config["task_type"], config["inference_mode"]) == ("CAUSAL_LM", True)
    assert not model.peft_config["default"].inference_mode
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_saving_twice_gives_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(str(tiny_model_dir), ModelSettings()))
    for name in "ab":
        save_model(trained(tiny_model_dir, {}), tokenizer, tmp_path / name)
        tokenizer(["one", "two words"], padding=True, truncation=True, max_length=4)  # leaves marks in tokenizers
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_whole_model_loads_in_transformers(
    families: dict[str, Path], tiny_tokenizer: Any, tmp_path: Path, family: str, attention: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_model(str(families[family]), ModelSettings())
    model = load_model(source, dtype=torch.float32, device="cpu", attention=attention)
    for parameter in model.parameters():
        parameter.data += 0.01
    save_model(model, tiny_tokenizer, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=attention)
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    assert plain.config.tie_word_embeddings == (family == "llama")
    assert (tmp_path / "model" / "generation_config.json").exists()
    assert attention not in (tmp_path / "model" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == tiny_tokenizer.chat_template


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_are_read_back_bit_for_bit(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path, method: str
) -> None:
    model = trained(tiny_model_dir, {"training.method": method})
    write_model(model, tiny_tokenizer, tmp_path)
    other = apply_adapter(load(tiny_model_dir), Config.load(None, {"lora.rank": 4, "training.method": method}))
    places = [parameter.data_ptr() for _, parameter in trainable_parameters(other)]
    read_weights(other, tmp_path)
    for (name, a), (_, b) in zip(trainable_parameters(model), trainable_parameters(other), strict=True):
        assert torch.equal(a, b), name
    assert places == [parameter.data_ptr() for _, parameter in trainable_parameters(other)]


def test_whole_weights_of_another_model_are_refused(families: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="does not fit the model"):
        read_weights(load(families["llama"]), families["qwen2"])


def test_a_failed_save_leaves_what_was_there(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = trained(tiny_model_dir, {})
    save_model(model, tiny_tokenizer, tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        save_model(model, Full(), tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["out"]


@pytest.mark.parametrize(
    ("family", "variant", "dtype"),
    [(family, variant, "fp32") for family in ("llama", "qwen2") for variant in VARIANTS]
    + [("llama", "lora", "bf16"), ("qwen2", "dora", "bf16")],
)
def test_a_merge_equals_the_adapter(
    families: dict[str, Path], tiny_tokenizer: Any, tmp_path: Path, family: str, variant: str, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = trained(families[family], VARIANTS[variant])
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    found, wanted = plain.float()(IDS).logits.detach(), model(IDS).logits.detach()
    assert float((found - wanted).norm() / wanted.norm()) < 2 * report.tolerance
    assert report.relative_difference <= report.tolerance
    assert report.adapter_effect > 4 * report.relative_difference
    written = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert written["relative_difference"] == report.relative_difference
    assert f"{report.relative_difference:.1e}" in str(report)
    assert not list((tmp_path / "merged").glob("adapter*"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merge_equals_the_adapter_on_a_base_in_4_bits(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path, variant: str, dtype: str
) -> None:
    """It is the unpacked base that the update is added to, not the one that was quantized."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    model = trained(tiny_model_dir, {"training.method": "qlora", **VARIANTS[variant]})
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    assert report.relative_difference <= report.tolerance
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").float()
    found, wanted = plain(IDS).logits.detach(), model(IDS).logits.detach()
    assert float((found - wanted).norm() / wanted.norm()) < 2 * report.tolerance
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()


def test_a_merge_keeps_the_dtype_of_the_base(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_model(load(tiny_model_dir, torch.bfloat16), tiny_tokenizer, tmp_path / "base")
    save_model(trained(tmp_path / "base", {}), tiny_tokenizer, tmp_path / "adapter")
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged").dtype == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_merge_that_differs_leaves_nothing(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(trained(tiny_model_dir, {}), tiny_tokenizer, tmp_path / "adapter")
    write = write_model

    def spoiled(model: Any, tokenizer: Any, folder: Path) -> None:
        model.model.layers[1].mlp.up_proj.weight.data[3] += 0.5
        write(model, tokenizer, folder)

    monkeypatch.setattr(llamahome.model.export, "write_model", spoiled)
    with pytest.raises(ModelError, match="the merged model's logits differ by") as caught:
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert caught.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["adapter"]


def test_a_merge_that_rounds_the_adapter_away_is_refused(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    save_model(trained(tiny_model_dir, {}, noise=3e-5), tiny_tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"rounding to bfloat16 .* hides what the adapter does"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="bf16")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="fp32")


def test_an_untrained_adapter_merges_to_its_base(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = apply_adapter(load(tiny_model_dir), Config.load(None, {"lora.rank": 4}))
    assert all(not tensor.any() for name, tensor in adapter_state(model).items() if "lora_B" in name)
    save_model(model, tiny_tokenizer, tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert report.adapter_effect == report.relative_difference == 0.0


def test_a_merge_never_overwrites(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_model(trained(tiny_model_dir, {}), tiny_tokenizer, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="the output is not empty") as caught:
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert caught.value.exit_code == 2
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        merge_adapter(tiny_model_dir, tmp_path / "new")
