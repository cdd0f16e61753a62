"""A GGUF file of a trained model has its weights, its next tokens and its tokenizer, or it is not there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from llamahome.config import Config, ModelSettings
from llamahome.errors import ModelError
from llamahome.model.adapters import apply_adapter, trainable_parameters
from llamahome.model.export import merge_adapter, save_model
from llamahome.model.gguf_export import read_gguf, write_gguf
from llamahome.model.load import load_model, load_tokenizer, resolve_model

IDS = torch.arange(512).mul(7919).remainder(512).view(2, 256)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = "The quick brown fox: 12345, naïve café!\n<|im_start|>user\nhi<|im_end|>"


def load(folder: Path) -> Any:
    source = resolve_model(str(folder), ModelSettings())
    return load_model(source, dtype=torch.float32, device="cpu", attention="sdpa")


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def adapter(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A trained adapter whose base has tied embeddings (llama), or biases, a head and a split of its own (qwen2)."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    base = tiny_model_dir
    if request.param == "qwen2":
        config = Qwen2Config(
            vocab_size=512, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
        base = folder / "base"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = Qwen2ForCausalLM(config)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.data.normal_(0, 0.02)
        model.save_pretrained(base)
        tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
        tiny_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tiny_tokenizer.save_pretrained(base)
    model = apply_adapter(load(base), Config.load(None, {"lora.rank": 4}))
    generator = torch.Generator().manual_seed(7)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_model(model, tiny_tokenizer, folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def exports(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The merge in float32 safetensors, and both GGUF files."""
    folder = tmp_path_factory.mktemp("exports")
    merge_adapter(adapter, folder / "safetensors", dtype="fp32")
    for kind in ("f16", "q8_0"):
        report = merge_adapter(adapter, folder / kind, form=f"gguf-{kind}")  # type: ignore[arg-type]
        assert report.dtype == kind
        assert 0 < report.relative_difference <= report.tolerance < report.adapter_effect
    return {path.name: path for path in folder.iterdir()}


def file_in(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


@torch.no_grad()
@pytest.mark.parametrize(("kind", "least"), [("f16", 0.99), ("q8_0", 0.9)])
def test_transformers_reads_the_same_next_tokens(exports: dict[str, Path], kind: str, least: float) -> None:
    from transformers import AutoModelForCausalLM

    wanted = AutoModelForCausalLM.from_pretrained(exports["safetensors"])(IDS).logits.argmax(-1)
    found = read_gguf(file_in(exports[kind]))(IDS).logits.argmax(-1)
    assert len(wanted.unique()) > 20
    assert (found == wanted).double().mean() >= least


def test_f16_holds_each_weight_rounded_once(exports: dict[str, Path]) -> None:
    wanted, found = load(exports["safetensors"]).state_dict(), read_gguf(file_in(exports["f16"])).state_dict()
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight.half().float() if weight.ndim > 1 else weight), name


def test_q8_0_is_within_half_a_step_of_each_weight(exports: dict[str, Path]) -> None:
    wanted, found = load(exports["safetensors"]).state_dict(), read_gguf(file_in(exports["q8_0"])).state_dict()
    for name, weight in wanted.items():
        if weight.ndim == 1 or weight.shape[1] % 32:  # vectors, and rows that are no whole blocks
            assert torch.equal(found[name], weight.half().float() if weight.ndim > 1 else weight), name
            continue
        blocks, error = weight.view(-1, 32), (found[name] - weight).view(-1, 32).abs()
        step = blocks.abs().amax(1, keepdim=True) / 127
        # The scale is rounded to half precision: 127 of its errors of 2^-11 come on top.
        assert bool((error <= step * (0.5 + 127 * 2**-11 + 1e-3)).all()), name


def test_matrices_are_in_the_kind_asked_for_and_vectors_in_float32(exports: dict[str, Path]) -> None:
    for kind, wanted in (("f16", gguf.GGMLQuantizationType.F16), ("q8_0", gguf.GGMLQuantizationType.Q8_0)):
        tensors = gguf.GGUFReader(file_in(exports[kind])).tensors
        vectors = {t.tensor_type for t in tensors if len(t.shape) == 1}
        whole = {t.tensor_type for t in tensors if len(t.shape) == 2 and t.shape[0] % 32 == 0}
        assert (vectors, whole) == ({gguf.GGMLQuantizationType.F32}, {wanted})


def test_an_export_can_be_trained_on_again(exports: dict[str, Path]) -> None:
    source = resolve_model(str(file_in(exports["f16"])), ModelSettings())
    found = load_tokenizer(source)
    wanted = load_tokenizer(resolve_model(str(exports["safetensors"]), ModelSettings()))
    assert found(TEXT).input_ids == wanted(TEXT).input_ids
    assert found.chat_template == wanted.chat_template
    assert (found.bos_token_id, found.eos_token_id) == (wanted.bos_token_id, wanted.eos_token_id) == (0, 2)
    assert load(source.folder)(IDS, labels=IDS).loss.isfinite()


def test_another_architecture_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="no GGUF export of the architecture 'gpt2'") as caught:
        write_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", "f16")
    assert (caught.value.exit_code, list(tmp_path.glob("*.gguf"))) == (4, [])


def test_scaled_rotary_embeddings_are_refused(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = load(tiny_model_dir)
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ModelError, match="no GGUF export of rotary embeddings 'yarn'"):
        write_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", "f16")


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ModelError, match="no byte-level BPE"):
        write_gguf(load(tiny_model_dir), tokenizer, tmp_path / "model.gguf", "q8_0")
