"""Every damaged, incomplete or hostile model folder ends in one line that names the file, and runs no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamahome.config import ModelSettings
from llamahome.errors import LlamaHomeError, ModelError
from llamahome.model.checks import check_model_folder
from llamahome.model.load import load_model, load_tokenizer, resolve_model


def load(folder: Path, **settings: Any) -> Any:
    source = resolve_model(str(folder), ModelSettings(**settings))
    load_tokenizer(source)
    return load_model(source, dtype=torch.float32, device="cpu", attention="sdpa")


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit(folder: Path, name: str = "config.json", **values: object) -> None:
    path = folder / name
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def truncate(folder: Path, size: int) -> None:
    os.truncate(folder / "model.safetensors", size)


def raw_header(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


def index(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    content = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def linked_shard(folder: Path) -> None:
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    shutil.move(folder / "model.safetensors", outside / "x.safetensors")
    (folder / "x.safetensors").symlink_to(outside / "x.safetensors")
    content = {"metadata": {}, "weight_map": {"model.norm.weight": "x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

DAMAGE = {
    "empty folder": (empty, "no config.json"),
    "no config": (lambda f: remove(f, "config.json"), "no config.json"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "no valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, got list"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "no valid JSON"),
    "config is huge": (lambda f: (f / "config.json").write_text(" " * (2 << 20) + "{}"), "bytes, at most"),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff\xfe"}'), "no valid JSON"),
    "no model_type": (lambda f: edit(f, model_type=None), "no model_type"),
    "unknown model_type": (lambda f: edit(f, model_type="lamma"), "unknown model_type 'lamma'"),
    "an encoder": (lambda f: edit(f, model_type="t5", architectures=["T5EncoderModel"]), "no causal language model"),
    "a classifier": (lambda f: edit(f, architectures=["LlamaForSequenceClassification"]), "no causal language model"),
    "quantized by GPTQ": (
        lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized already (gptq): they need layers of gptqmodel and optimum, which no method here trains on",
    ),
    "quantized by AWQ": (
        lambda f: edit(f, quantization_config={"quant_method": "awq", "bits": 4}),
        "quantized already (awq): they need layers of gptqmodel, which no method here trains on",
    ),
    "quantized by others": (
        lambda f: edit(f, quantization_config={"quant_method": "fp8"}),
        "quantized already (fp8): they need layers of another library",
    ),
    "wrong type in config": (lambda f: edit(f, hidden_size="wide"), "hidden_size"),
    "no weights": (lambda f: remove(f, "model.safetensors"), "no weights (model.safetensors)"),
    "weights of 0 bytes": (lambda f: truncate(f, 0), "ends before its header"),
    "weights cut in the header": (lambda f: truncate(f, 100), "ends within its header"),
    "weights cut in the data": (lambda f: truncate(f, 200_000), "model.safetensors"),
    "header claims 2^62 bytes": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "the header claims",
    ),
    "header is no JSON": (lambda f: raw_header(f, b"{'a'"), "damaged weight file"),
    "header names a tensor twice": (lambda f: raw_header(f, TWICE, bytes(4)), "names a tensor twice"),
    "header is a list": (lambda f: raw_header(f, b"[]"), "damaged weight file"),
    "bytes after the data": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"x"),
        "damaged weight file",
    ),
    "more layers in config": (
        lambda f: edit(f, num_hidden_layers=3),
        "9 missing from the file (model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
        "model.layers.2.mlp.gate_proj.weight and 6 more)",
    ),
    "fewer layers in config": (
        lambda f: edit(f, num_hidden_layers=1),
        "9 unknown to config.json (model.layers.1.input_layernorm.weight",
    ),
    "other hidden size": (lambda f: edit(f, intermediate_size=96), "of another shape (model.layers.0.mlp.down_proj"),
    "impossible size": (lambda f: edit(f, intermediate_size=10**9), "of another shape"),
    "one weight gone": (
        lambda f: weights(f, lambda s: s.pop("model.norm.weight")),
        "1 missing from the file (model.norm",
    ),
    "a weight too many": (
        lambda f: weights(f, lambda s: s.update(extra=torch.zeros(2))),
        "1 unknown to config.json (extra)",
    ),
    "untied, without a head": (
        lambda f: edit(f, tie_word_embeddings=False),
        "1 missing from the file (lm_head.weight)",
    ),
    "other vocabulary": (lambda f: edit(f, vocab_size=500), "ids up to 511, the model's embedding 500 rows"),
    "shard is missing": (lambda f: index(f, "model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors is"),
    "shard leads up": (lambda f: index(f, "../model.safetensors"), "is no plain .safetensors file name"),
    "shard is absolute": (lambda f: index(f, "/etc/x.safetensors"), "is no plain .safetensors file name"),
    "shard is no safetensors": (lambda f: index(f, "model.bin"), "is no plain .safetensors file name"),
    "shard links outside": (linked_shard, "is a link that leaves the folder"),
    "index without map": (
        lambda f: (index(f, "x"), (f / "model.safetensors.index.json").write_text("{}")),
        "weight_map or metadata is missing",
    ),
    "DCP checkpoint": (lambda f: (f / ".metadata").write_bytes(b"x"), "distributed checkpoint, which can run code"),
    "DCP shards": (lambda f: (f / "shard-00001-model-00001-of-00001.safetensors").touch(), "distributed checkpoint"),
    "no tokenizer": (lambda f: remove(f, "tokenizer.json"), "no tokenizer (tokenizer.json)"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "damaged tokenizer"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter, not a whole model"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_and_code_4(folder: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load(folder)
    message = str(caught.value)
    assert expected in message
    assert str(folder) in message
    assert "\n" not in message
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("settings", [{"quant_method": "awq", "bits": 4, "version": "gemm"}, "int4"])
def test_a_quantized_model_has_an_alternative_to_type(folder: Path, settings: Any) -> None:
    edit(folder, quantization_config=settings)
    with pytest.raises(ModelError, match="quantized already") as caught:
        check_model_folder(folder, trust_remote_code=False, allow_pickle=False)
    assert caught.value.fix == "name the unquantized model and set training.method: qlora, or name a GGUF file of it"


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_a_pickle_never_runs(folder: Path, tmp_path: Path, allow: bool, raw: bool) -> None:
    canary = tmp_path / "canary"
    remove(folder, "model.safetensors")
    path = folder / "pytorch_model.bin"
    payload = {"model.norm.weight": Payload(canary)}
    path.write_bytes(pickle.dumps(payload)) if raw else torch.save(payload, path)
    with pytest.raises(ModelError) as caught:
        load(folder, allow_pickle=allow)
    assert not canary.exists()
    assert caught.value.exit_code == 4
    assert ("are pickles" in str(caught.value)) is not allow


def test_a_pickle_of_tensors_loads_when_allowed(folder: Path) -> None:
    expected = load(folder).state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    remove(folder, "model.safetensors")
    found = load(folder, allow_pickle=True).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_pickle_beside_safetensors_is_not_opened(folder: Path, tmp_path: Path) -> None:
    torch.save({"x": Payload(tmp_path / "canary")}, folder / "pytorch_model.bin")
    load(folder, allow_pickle=True)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused_by_name_and_without_a_question(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    edit(folder, name, auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})
    monkeypatch.setattr(sys, "stdin", None)  # a question would fail otherwise
    with pytest.raises(ModelError, match=r"evil\.Evil.*auto_map") as caught:
        load(folder)
    assert caught.value.exit_code == 4
    assert not canary.exists()


def test_remote_code_runs_when_allowed(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    edit(folder, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"})
    assert type(load(folder, trust_remote_code=True)).__name__ == "MyModel"


def test_errors_name_another_cause_than_the_model(folder: Path) -> None:
    source = resolve_model(str(folder), ModelSettings())
    with pytest.raises(LlamaHomeError) as caught:
        load_model(source, dtype=torch.float32, device="cpu", attention="flash_attention_2")
    assert caught.value.exit_code == 9
    with pytest.raises(LlamaHomeError, match="no attention 'nonsense'") as caught:
        load_model(source, dtype=torch.float32, device="cpu", attention="nonsense")
    assert caught.value.exit_code == 2
