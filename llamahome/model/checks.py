"""What is checked in a model folder before anything in it is loaded: no code, no pickle, no damaged file."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llamahome.errors import ModelError

_JSON_LIMIT = 1 << 20
_INDEX_LIMIT = 64 << 20  # a few hundred thousand tensor names
_HEADER_LIMIT = 100_000_000  # the format's own limit
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-.*\.safetensors|.*\.distcp|\.metadata")
# Keys of config.json that say nothing about what the model computes.
_VOLATILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}

# What transformers 5 reads weights with that others have quantized; why it is not offered: docs/decisions.md.
_BACKENDS = MappingProxyType({"awq": "gptqmodel", "gptq": "gptqmodel and optimum"})

Header = dict[str, tuple[str, tuple[int, ...]]]


def read_json(path: Path, limit: int = _JSON_LIMIT) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes. Raises: ModelError that names the file."""
    try:
        if path.stat().st_size > limit:
            raise ModelError(f"{path.stat().st_size} bytes, at most {limit} are read", where=str(path))
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"no {path.name}", where=str(path.parent.absolute()), fix="name a model folder") from error
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"no valid JSON: {error}", where=str(path), fix="fetch the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"expected a JSON object, got {type(content).__name__}", where=str(path), fix="fetch it again")
    return content


def check_model_folder(folder: Path, *, trust_remote_code: bool, allow_pickle: bool) -> dict[str, Any]:
    """Return the content of config.json of a causal language model whose files are all sound.

    Raises: ModelError that names the file and the fault.
    """
    config = read_json(folder / "config.json")
    check_no_code(folder / "config.json", config, trust_remote_code)
    if "auto_map" not in config:
        _check_causal(folder / "config.json", config)
    if config.get("quantization_config"):
        _refuse_quantized(folder / "config.json", config["quantization_config"])
    for path in weight_files(folder, allow_pickle=allow_pickle):
        if path.suffix == ".safetensors":
            read_header(path)
    return config


def _refuse_quantized(path: Path, settings: Any) -> None:
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    layers = _BACKENDS.get(str(method), "another library")
    raise ModelError(
        f"the weights are quantized already ({method}): they need layers of {layers}, which no method here trains on",
        where=str(path), fix="name the unquantized model and set training.method: qlora, or name a GGUF file of it",
    )  # fmt: skip


def check_no_code(path: Path, content: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse a file that asks for Python code beside it, without asking back. Raises: ModelError."""
    if not trust_remote_code and (code := content.get("auto_map")):
        names = ", ".join(map(str, code.values())) if isinstance(code, dict) else str(code)
        raise ModelError(
            f"the model asks to run its own Python code ({names})", where=f"{path}: auto_map",
            fix="read that code; then allow it with --trust-remote-code, or delete auto_map to use the built-in class",
        )  # fmt: skip


def _check_causal(path: Path, config: dict[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str) or not isinstance(architectures, list):
        raise ModelError("no model_type, or architectures is no list", where=str(path), fix="fetch the file again")
    if kind not in CAUSAL and kind not in CONFIG_MAPPING_NAMES:
        raise ModelError(f"unknown model_type {kind!r}", where=str(path), fix="install a newer transformers")
    if kind not in CAUSAL or (architectures and not _causal_names(CAUSAL).intersection(map(str, architectures))):
        raise ModelError(
            f"{', '.join(map(str, architectures)) or kind} is no causal language model", where=str(path),
            fix="name a decoder model, such as a ...ForCausalLM",
        )  # fmt: skip


def _causal_names(mapping: Any) -> set[str]:
    names: set[str] = set()
    for value in mapping.values():
        names.update([value] if isinstance(value, str) else value)
    return names


def weight_files(folder: Path, *, allow_pickle: bool = False, stem: str = "model") -> list[Path]:
    """The weight files of a model folder, safetensors first; `stem` is "adapter_model" for an adapter.

    Raises: ModelError when there are none, a shard is missing or not a plain file name, or only pickles are there.
    """
    if any(_DISTRIBUTED.fullmatch(path.name) for path in folder.iterdir()):
        raise ModelError(
            "a distributed checkpoint, which can run code", where=str(folder), fix="export it as safetensors"
        )
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        return _shards(folder, index, ".safetensors")
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles and not allow_pickle:
        raise ModelError(
            "the weights are pickles, which can run code", where=str(pickles[0]),
            fix="convert them to safetensors, or allow them with --allow-pickle",
        )  # fmt: skip
    single = folder / ("pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    index = single.with_name(f"{single.name}.index.json")
    if allow_pickle and single.exists():
        return [single]
    if allow_pickle and index.exists():
        return _shards(folder, index, ".bin")
    raise ModelError(f"no weights ({stem}.safetensors)", where=str(folder), fix="name a complete model folder")


def _shards(folder: Path, index: Path, suffix: str) -> list[Path]:
    content = read_json(index, _INDEX_LIMIT)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or "metadata" not in content:
        raise ModelError("weight_map or metadata is missing", where=str(index), fix="fetch the file again")
    return [_shard(folder, index, name, suffix) for name in sorted({str(name) for name in shards.values()})]


def _shard(folder: Path, index: Path, name: str, suffix: str) -> Path:
    if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(suffix):
        raise ModelError(f"{name!r} is no plain {suffix} file name", where=str(index), fix="do not use this model")
    path = folder / name
    # The hub's cache keeps the files of snapshots/<commit>/ as links into blobs/.
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise ModelError(f"{name!r} is a link that leaves the folder", where=str(index), fix="copy the file here")
    if not path.is_file():
        raise ModelError(f"the shard {name} is missing", where=str(folder), fix="fetch the model again")
    return path


def read_header(path: Path) -> Header:
    """Tensor names, types and shapes of a safetensors file whose size fits its header. Raises: ModelError."""
    from safetensors import SafetensorError, safe_open

    try:
        entries = json.loads(_header_bytes(path), object_pairs_hook=_unique)
        with safe_open(path, framework="np"):  # checks offsets, holes, overlaps and the file's end
            pass
        entries.pop("__metadata__", None)
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"damaged weight file: {error}", where=str(path), fix="fetch or save it again") from error


def _header_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError("the file ends before its header")
        (length,) = struct.unpack("<Q", prefix)
        if length > _HEADER_LIMIT:
            raise ValueError(f"the header claims {length} bytes")
        header = file.read(length)
    if len(header) < length:
        raise ValueError("the file ends within its header")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("the header names a tensor twice")
    return content


def check_loaded_keys(info: dict[str, Any], path: Path) -> None:
    """Refuse a model some of whose weights were not in its files, or the other way round.

    `info` is what transformers reports with `output_loading_info`; it would start missing weights at random.
    """
    faults = [
        _some("missing from the file", sorted(info["missing_keys"])),
        _some("unknown to config.json", sorted(info["unexpected_keys"])),
        _some("of another shape", [f"{key} {[*a]} instead of {[*b]}" for key, a, b in sorted(info["mismatched_keys"])]),
        *info["error_msgs"],
    ]
    if any(faults):
        raise ModelError(
            f"weights and config.json do not match: {', '.join(filter(None, faults))}", where=str(path),
            fix="use the config.json that was saved with these weights",
        )  # fmt: skip


def _some(kind: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{len(keys)} {kind} ({', '.join(keys[:3])}{more})" if keys else ""


def model_fingerprint(folder: Path) -> str:
    """64 hex digits that tell models apart: the config, and of each weight file size, header and 16 samples of 4 KiB.

    Copies of a model have the same one; reading takes milliseconds whatever the size. Raises: ModelError.
    """
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(folder, allow_pickle=True):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                digest.update(_header_bytes(path))
            for k in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * k // (_SAMPLES - 1) if size > _SAMPLE_BYTES else 0)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
