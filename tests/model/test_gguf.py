"""A GGUF file becomes a plain model folder once, with the same weights, and a damaged one is refused."""

from __future__ import annotations

import json
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import llamahome.model.gguf
from llamahome.config import ModelSettings
from llamahome.errors import ModelError, StorageError
from llamahome.model.load import load_model, load_tokenizer, resolve_model

TEXT = "The quick brown fox: 12345, naïve café!\n<|im_start|>user\nhi<|im_end|>"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary dimensions (convert_hf_to_gguf.py: LlamaModel.permute)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, tokenizer: Any, split: str) -> None:
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if k < 3 else 1 for k in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = permute(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, LlamaForCausalLM.from_pretrained(tiny_model_dir), tiny_tokenizer, "gpt-2")
    return path


def test_the_converted_model_is_the_same_model(tiny_gguf: Path, tiny_model_dir: Path, tiny_tokenizer: Any) -> None:
    from transformers import LlamaForCausalLM

    source = resolve_model(str(tiny_gguf), ModelSettings())
    model = load_model(source, dtype=torch.float32, device="cpu", attention="sdpa")
    original = LlamaForCausalLM.from_pretrained(
        tiny_model_dir, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    )
    for name, parameter in original.named_parameters():
        parameter.data = parameter.bfloat16().float()
        assert torch.equal(model.get_parameter(name), parameter), name
    tokenizer = load_tokenizer(source)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids.tolist()[0] == tiny_tokenizer(TEXT).input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2, 0)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer.model_max_length == 2048


def test_the_folder_bears_no_mark_of_quantization_and_loads_in_plain_transformers(tiny_gguf: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(str(tiny_gguf), ModelSettings()).folder
    config = json.loads((folder / "config.json").read_text())
    assert not {key for key in config if "quant" in key or "name" in key}
    assert config["rms_norm_eps"] == 1e-6
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not getattr(model, "is_quantized", False)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"


def test_a_file_is_converted_once_whatever_its_name(tiny_gguf: Path, tmp_path: Path) -> None:
    first = resolve_model(str(tiny_gguf), ModelSettings()).folder
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "folder").mkdir()
    copy = tmp_path / "folder" / "tiny.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    for name in (copy, copy.parent):
        assert resolve_model(str(name), ModelSettings()).folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in first.parent.iterdir() if p.is_dir()] == [first.name]


def test_of_two_at_once_one_converts_and_the_other_waits(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    convert = llamahome.model.gguf._convert

    def counted(file: Path, folder: Path) -> None:
        calls.append(file)
        time.sleep(0.2)  # long enough for the other to find the lock taken
        convert(file, folder)

    monkeypatch.setattr("llamahome.model.gguf._convert", counted)
    with ThreadPoolExecutor(2) as pool:  # flock holds between two open files, of one process or of two
        both = pool.map(lambda _: resolve_model(str(tiny_gguf), ModelSettings()), range(2))
    assert len({source.folder for source in both}) == len(calls) == 1


def test_a_killed_conversion_leaves_nothing_that_counts(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Path(os.environ["LLAMAHOME_CACHE"], "models")
    cache.mkdir(parents=True)
    (cache / ".x-v1.tmp-999999999").mkdir()  # of a process that no longer runs
    monkeypatch.setattr("llamahome.model.gguf._correct_model", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resolve_model(str(tiny_gguf), ModelSettings())
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []
    monkeypatch.undo()
    monkeypatch.setenv("LLAMAHOME_CACHE", str(cache.parent))
    assert (resolve_model(str(tiny_gguf), ModelSettings()).folder / "config.json").exists()


def test_a_lack_of_memory_is_no_fault_of_the_file(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: str) -> None:
        raise MemoryError

    monkeypatch.setattr("llamahome.model.gguf._read", read)
    with pytest.raises(MemoryError):
        resolve_model(str(tiny_gguf), ModelSettings())


def test_a_cache_that_cannot_be_written_is_a_storage_error(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        resolve_model(str(tiny_gguf), ModelSettings(), tmp_path / "file")
    assert caught.value.exit_code == 6


def test_digits_are_split_one_by_one_for_smollm(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    write_gguf(tmp_path / "x.gguf", LlamaForCausalLM.from_pretrained(tiny_model_dir), tiny_tokenizer, "smollm")
    tokenizer = load_tokenizer(resolve_model(str(tmp_path / "x.gguf"), ModelSettings()))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a =  12 b3")
    assert [piece for piece, _ in pieces] == ["a", "Ġ=", "ĠĠ", "1", "2", "Ġb", "3"]


def test_an_unknown_split_rule_is_said(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    from transformers import LlamaForCausalLM

    write_gguf(tmp_path / "x.gguf", LlamaForCausalLM.from_pretrained(tiny_model_dir), tiny_tokenizer, "novel-rule")
    resolve_model(str(tmp_path / "x.gguf"), ModelSettings())
    assert "split rule 'novel-rule' is not known" in caplog.text


def without_tensor(content: bytes) -> bytes:
    return content.replace(b"output_norm.weight", b"output_gnorm.weigh")


DAMAGE = {
    "wrong magic": (lambda c: b"GGML" + c[4:], "begins with b'GGML'"),
    "empty": (lambda c: b"", "begins with b''"),
    "magic alone": (lambda c: c[:4], "cannot be converted"),
    "unknown version": (lambda c: c[:4] + struct.pack("<I", 99) + c[8:], "cannot be converted"),
    "huge tensor count": (lambda c: c[:8] + struct.pack("<Q", 2**62) + c[16:], "cannot be converted"),
    "huge key count": (lambda c: c[:16] + struct.pack("<Q", 2**62) + c[24:], "cannot be converted"),
    "huge string": (lambda c: c[:24] + struct.pack("<Q", 2**62) + c[32:], "cannot be converted"),
    "cut in the header": (lambda c: c[:2000], "cannot be converted"),
    "cut in the tensors": (lambda c: c[:-5000], "cannot be converted"),
    "unknown architecture": (
        lambda c: c.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00lemma", 1),
        "cannot be converted",
    ),
    "tensor under another name": (without_tensor, "1 missing from the file (model.norm.weight)"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(tiny_gguf: Path, tmp_path: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(tiny_gguf.read_bytes()))
    with pytest.raises(ModelError) as caught:
        resolve_model(str(path), ModelSettings())
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(Path(os.environ["LLAMAHOME_CACHE"]).glob("models/*/"))


@pytest.mark.slow
def test_the_embedded_smollm2_is_a_good_model() -> None:
    source = resolve_model(None, ModelSettings())
    model = load_model(source, dtype=torch.float32, device="cpu", attention="sdpa")
    tokenizer = load_tokenizer(source)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]) == (1e-5, 100000.0)
    assert (source.folder / "model.safetensors").stat().st_size == pytest.approx(269e6, rel=0.01)
    texts = [
        "The capital of France is Paris, which lies on the river Seine.",
        "Once upon a time there was a little girl who lived in a small village near the forest.",
        "She opened the door and walked into the room, where her mother was sitting at the table.",
    ]
    losses = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            losses.append(float(model(ids, labels=ids).loss))
    assert sum(losses) / 3 < 2.6  # 2.34 when it was written; a wrong rotary order gives over 8
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
