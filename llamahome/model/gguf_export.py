"""GGUF files of a trained model, for llama.cpp and what is built on it, written by the package `gguf`."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal

from llamahome.errors import ModelError
from llamahome.model.quiet import quiet_transformers

Kind = Literal["f16", "q8_0"]
# transformers' model_type -> llama.cpp's architecture; those whose tensors differ by names and rotary order alone.
_ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2"}
_ROTARY = ("q_proj", "k_proj")
# How text is split before BPE: the regular expression, or digits one by one, and llama.cpp's name for it.
_SPLITS = {r"\p{N}{1,3}": "llama-bpe", r"\p{N}": "qwen2"}


def write_gguf(model: Any, tokenizer: Any, file: Path, kind: Kind) -> None:
    """Write a transformers model in float32 and its tokenizer into one file; matrices in `kind`, vectors in float32.

    A matrix whose rows are no whole blocks of 32 stays in f16.
    Raises: ModelError for an architecture or a tokenizer that is not known here.
    """
    import gguf

    config = model.config
    name = _ARCHITECTURES.get(config.model_type)
    if name is None:
        raise ModelError(f"no GGUF export of the architecture {config.model_type!r}", where=str(file),
                         fix=f"known are {', '.join(_ARCHITECTURES)}; export safetensors")  # fmt: skip
    architecture = gguf.MODEL_ARCH[name]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    _write_sizes(writer, config, kind)
    _write_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for parameter_name, parameter in model.named_parameters():
        stem, _, suffix = parameter_name.rpartition(".")
        array, encoding = _encoded(_in_their_order(parameter_name, parameter.detach().float(), config), kind)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", array, raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: Any, kind: Kind) -> None:
    import gguf

    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"no GGUF export of rotary embeddings {rope['rope_type']!r}", fix="export safetensors")
    writer.add_file_type({"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Byte-level BPE, as llama.cpp's "gpt2". Rows of the embedding without a token get a name that no text has."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]
    if vocabulary.get("type") != "BPE" or "ByteLevel" not in json.dumps(state["pre_tokenizer"]):
        raise ModelError("no GGUF export of this tokenizer, which is no byte-level BPE", fix="export safetensors")
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    special = {entry["id"]: entry["special"] for entry in state["added_tokens"]}
    words = [tokens.get(number, f"[UNUSED{number}]") for number in range(rows)]
    kinds = [5 if number not in tokens else {None: 1, False: 4, True: 3}[special.get(number)] for number in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(state["pre_tokenizer"]))
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in vocabulary["merges"]])
    for key in ("bos", "eos", "pad"):
        if (number := getattr(tokenizer, f"{key}_token_id")) is not None:
            getattr(writer, f"add_{key}_token_id")(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split(rule: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits text before BPE. Raises: ModelError for one that it may not have."""
    steps = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = str(steps[0]["pattern"].get("Regex", ""))
        for part, name in _SPLITS.items():
            if re.search(rf"\|{re.escape(part)}\|", pattern):
                return name
    raise ModelError(f"no GGUF export of a tokenizer that splits text by {kinds}", fix="export safetensors")


def _in_their_order(name: str, weight: Any, config: Any) -> Any:
    """llama.cpp turns neighbouring dimensions of Llama's queries and keys, transformers those half a head apart."""
    if config.model_type != "llama" or not any(part in name for part in _ROTARY):
        return weight
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def _encoded(weight: Any, kind: Kind) -> tuple[Any, Any]:
    import gguf
    import numpy as np

    types, array = gguf.GGMLQuantizationType, np.ascontiguousarray(weight.cpu().numpy())
    if array.ndim == 1:
        return array, types.F32
    chosen = types.Q8_0 if kind == "q8_0" and array.shape[1] % 32 == 0 else types.F16
    return gguf.quants.quantize(array, chosen), chosen


def read_gguf(file: Path) -> Any:
    """The model in a GGUF file as plain transformers reads it, unpacked to float32."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with quiet_transformers(), redirect_stderr(io.StringIO()):  # a progress bar that its switch does not reach
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ).eval()
