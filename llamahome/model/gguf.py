"""GGUF files, converted once into a plain folder of bfloat16 safetensors that any library can load."""

from __future__ import annotations

import fcntl
import io
import logging
import mmap
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from llamahome.errors import ModelError
from llamahome.files import publish_folder, remove_leftovers, sha256, storage_errors
from llamahome.memory.oom import is_oom
from llamahome.model.checks import check_loaded_keys
from llamahome.model.quiet import quiet_transformers

logger = logging.getLogger(__name__)

_VERSION = 1  # of the conversion; a new one leaves the old folders unused
# llama.cpp's names (llama-vocab.cpp) of splits that transformers does not set up: digits one by one, then GPT-2's rule.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"}
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")


def convert_gguf(file: Path, cache: Path) -> Path:
    """The folder in `cache` with the converted model; written on first use, by one process while others wait.

    Its name holds the hash of the file's content. Raises: ModelError for a damaged or unknown file, StorageError.
    """
    _check_magic(file)
    slug = re.sub(r"[^\w.-]+", "-", file.stem)[:60]
    target = cache / f"{slug}-{sha256(file)[:24]}-v{_VERSION}"
    if target.is_dir():
        return target
    with storage_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{target.name}.lock"):
        if not target.is_dir():
            remove_leftovers(cache)
            logger.info("converting %s once into %s", file.name, target)
            with publish_folder(target) as folder:
                _convert(file, folder)
    return target


def _check_magic(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(file), fix="check the file") from error
    if magic != b"GGUF":
        raise ModelError(f"no GGUF file: it begins with {magic!r}", where=str(file), fix="fetch the file again")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with storage_errors(path), path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(file: Path, folder: Path) -> None:
    # transformers also looks at what lies beside the file, so it gets a folder of its own.
    with tempfile.TemporaryDirectory() as alone, quiet_transformers():
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        try:
            tokenizer, model, info = _read(alone)
        except Exception as error:  # of many types, from four libraries, for a damaged or unknown file
            if is_oom(error):
                raise
            raise ModelError(f"cannot be converted: {error}", where=str(file), fix="name another file") from error
        check_loaded_keys(info, file)
        _correct_model(model)
        _correct_tokenizer(tokenizer, _split_rule(file), model.config.max_position_embeddings)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _read(folder: str) -> tuple[Any, Any, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with redirect_stderr(io.StringIO()):  # a progress bar that transformers' switch does not reach
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.bfloat16, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
    return tokenizer, model, info


def _split_rule(file: Path) -> str:
    """llama.cpp's name of the rule that splits text before BPE; "" where the file has none."""
    key = b"tokenizer.ggml.pre" + struct.pack("<I", 8)  # 8 is the type of strings
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(key) + len(key)
        if start < len(key):
            return ""
        (length,) = struct.unpack("<Q", content[start : start + 8])
        return content[start + 8 : start + 8 + min(length, 64)].decode(errors="replace")


def _correct_model(model: Any) -> None:
    """Take away the marks of a quantized model, and the noise of float32 in decimal constants."""
    for mark in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
    for name in _EPSILONS:
        if isinstance(value := getattr(model.config, name, None), float):
            setattr(model.config, name, float(f"{value:.6g}"))
    model.config._name_or_path = ""


def _correct_tokenizer(tokenizer: Any, split: str, max_length: int) -> None:
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer.model_max_length = max_length
    if split in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif split and split not in _GPT2 | {"default"} and split not in GGUF_PRE_TOKENIZER_SPLITS:
        logger.warning("the tokenizer's split rule %r is not known; some words may get other tokens", split)
