"""Models and tokenizers, loaded only after their files have been checked."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llamahome.errors import ConfigError, MissingError, ModelError
from llamahome.memory.oom import is_oom
from llamahome.model.checks import (
    check_loaded_keys,
    check_model_folder,
    check_no_code,
    model_fingerprint,
    read_header,
    read_json,
    weight_files,
)
from llamahome.model.quiet import quiet_transformers
from llamahome.model.source import ModelSource, is_adapter, resolve_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llamahome.config import ModelSettings

__all__ = [
    "ModelSource",
    "load_model",
    "load_tokenizer",
    "load_trained",
    "model_fingerprint",
    "resolve_model",
    "source_of",
    "tokenizer_fingerprint",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "tekken.json")
_MARK = "_llamahome_source"


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, or the one that `model.tokenizer` names.

    Raises: ModelError when there is none, when it needs code, or when it has ids that the embedding has not.
    """
    from transformers import AutoTokenizer

    config = read_json(source.folder / "config.json")
    check_no_code(source.folder / "config.json", config, source.trust_remote_code)
    folder = source.tokenizer or source.folder
    if not has_tokenizer(folder):
        raise ModelError(
            f"no tokenizer ({_TOKENIZER_FILES[0]})", where=str(folder),
            fix="copy it into the folder, or set model.tokenizer to a folder that has one",
        )  # fmt: skip
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        check_no_code(settings, read_json(settings, 16 << 20), source.trust_remote_code)
    with quiet_transformers():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=source.trust_remote_code, local_files_only=True
            )
        except Exception as error:  # tokenizers raises plain Exception for a damaged file
            if is_oom(error):
                raise
            raise ModelError(f"damaged tokenizer: {error}", where=str(folder), fix="fetch it again") from error
    _check_vocabulary(tokenizer, config, folder)
    for key in ("is_local", "local_files_only"):  # how it was loaded here is not to be saved with it
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], folder: Path) -> None:
    rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0 or (isinstance(rows, int) and largest >= rows):
        raise ModelError(
            f"the tokenizer has ids up to {largest}, the model's embedding {rows} rows", where=str(folder),
            fix="use the tokenizer that belongs to the model",
        )  # fmt: skip


def load_model(
    source: ModelSource, *, dtype: torch.dtype | None, device: str | torch.device, attention: str, nf4: bool = False
) -> PreTrainedModel:
    """The causal language model in evaluation mode; weights stay mapped where `dtype` is the file's, or None for it.

    nf4: its linear layers in 4 bits, quantised one after the other as the file is read; `dtype` is then the type that
    they are unpacked to.

    Raises: ModelError for files that are missing, damaged, or do not fit config.json key by key; MissingError when the
    attention implementation needs a package; what an out-of-memory raises is let through.
    """
    if is_adapter(source.folder):
        raise ModelError("an adapter, not a whole model", where=str(source.folder), fix="name its base model")
    check_model_folder(source.folder, trust_remote_code=source.trust_remote_code, allow_pickle=source.allow_pickle)
    if nf4:
        from llamahome.model.quantize import check_nf4, quantize_model

        check_nf4(device)
    if attention == "llamahome":
        from llamahome.model.attention import register

        register()
    stored = stored_dtype(source.folder)
    # First without memory: a wrong config.json may ask for any amount of it.
    _, info = _from_pretrained(source, dtype=dtype or stored, device_map="meta", attn_implementation=attention)
    check_loaded_keys(info, source.folder)
    if nf4:
        # In the type of the file, so that nothing is read before its turn.
        model, _ = _from_pretrained(source, dtype=stored, attn_implementation=attention)
        unpacked = dtype or model.dtype
        model = quantize_model(model, dtype=unpacked, device=device)
        model.config.dtype = unpacked
    else:
        place = {} if str(device) == "cpu" else {"device_map": {"": device}}
        model, _ = _from_pretrained(source, dtype=dtype or stored, attn_implementation=attention, **place)
    model.name_or_path = model.config._name_or_path = source.reference
    setattr(model, _MARK, source)
    return model


def stored_dtype(folder: Path) -> torch.dtype | Literal["auto"]:
    """The type of most weights in the folder's safetensors files; "auto" for other files."""
    names: Counter[str] = Counter()
    for path in weight_files(folder, allow_pickle=True):
        if path.suffix == ".safetensors":
            for kind, shape in read_header(path).values():
                names[kind] += math.prod(shape)
    import torch

    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return known.get(names.most_common(1)[0][0], "auto") if names else "auto"


def source_of(model: Any) -> ModelSource | None:
    """Where `load_model` took this model, or the model inside this PEFT model, from."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(base, _MARK, None)


def _from_pretrained(source: ModelSource, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    safe = weight_files(source.folder, allow_pickle=source.allow_pickle)[0].suffix == ".safetensors"
    with quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                source.folder, use_safetensors=safe, weights_only=True, trust_remote_code=source.trust_remote_code,
                local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **settings,
            )  # fmt: skip
        except Exception as error:  # a foreign file can make these libraries raise anything
            if is_oom(error):
                raise
            raise _loading_error(error, source.folder, settings["attn_implementation"]) from error
    return model, info


def _loading_error(error: Exception, folder: Path, attention: str) -> Exception:
    if isinstance(error, ImportError):
        return MissingError(f"attention {attention!r}: {error}", where="processing.attention", fix="choose auto")
    if "attn_implementation" in str(error):
        return ConfigError(f"the model has no attention {attention!r}", where="processing.attention", fix="choose auto")
    return ModelError(f"cannot be loaded: {error}", where=str(folder), fix="check config.json, or fetch it again")


def load_trained(
    path: str | Path, settings: ModelSettings, *, dtype: torch.dtype, device: str | torch.device, attention: str,
    cache_dir: str | Path | None = None, unpack: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:  # fmt: skip
    """A model or an adapter on its base, whatever `path` holds, and its tokenizer.

    The base is the folder or hub id that adapter_config.json names, else what LlamaHome recorded at saving;
    `settings.name` goes before both. A base that was in 4 bits in training is so again; `dtype` is what they are
    unpacked to, when they are used or, with `unpack`, once and for all into plain layers. What was trained by `qat`
    rounds its weights as in training.
    Raises: ModelError, also for an adapter that was trained on another base; MissingError.
    """
    import torch

    from llamahome.model.adapters import attach_adapter, base_is_quantized, base_source, scheme_in
    from llamahome.model.fake_quant import join_adapter, prepare
    from llamahome.model.quantize import dequantize_model

    folder = Path(path).expanduser()
    if not is_adapter(folder):
        source = resolve_model(str(path), settings, cache_dir)
        if not is_adapter(source.folder):
            scheme = scheme_in(source.folder)  # rounds what the optimizer kept in float32
            model: Any = load_model(
                source, dtype=torch.float32 if scheme else dtype, device=device, attention=attention
            )
            if scheme:
                prepare(model, scheme)
            return model, load_tokenizer(source)
        folder = source.folder  # an adapter on the hub
    source = base_source(folder, settings, cache_dir)
    base = load_model(source, dtype=dtype, device=device, attention=attention, nf4=base_is_quantized(folder))
    if unpack:
        dequantize_model(base, dtype)
    if scheme := scheme_in(folder):
        prepare(base, scheme)
    model = attach_adapter(base, folder)
    if scheme:
        join_adapter(model)
    return model, load_tokenizer(replace(source, tokenizer=folder) if has_tokenizer(folder) else source)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """64 hex digits over all that turns text into ids: vocabulary, rules, special tokens and the chat template."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation")  # set by the last call, no property of the tokenizer
        state.pop("padding")
    else:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    state["llamahome"] = [tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()
