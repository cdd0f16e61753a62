"""What of a model is trained: LoRA adapters in PEFT's own form, or every weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamahome.errors import ConfigError, ModelError
from llamahome.memory.oom import is_oom
from llamahome.model.checks import Header, model_fingerprint, read_header, read_json, weight_files
from llamahome.model.compile import decoder_layers
from llamahome.model.fake_quant import Scheme, join_adapter, prepare, scheme_of
from llamahome.model.load import source_of
from llamahome.model.quantize import NF4
from llamahome.model.quiet import quiet_transformers
from llamahome.model.source import ADAPTER_CONFIG, ModelSource, resolve_model

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

    from llamahome.config import Config, ModelSettings

# Beside PEFT's files in an adapter folder: what PEFT's have no place for.
BASE_RECORD = "llamahome.json"


def apply_adapter(model: Any, config: Config) -> Any:
    """The model made ready for `training.method`: with a LoRA adapter in fp32, or all weights trainable.

    Under `qat` its linear layers round their weights. The adapter's first values depend on `training.seed` alone, and
    torch's random state stays as it was. Raises: ConfigError for a scheme or target modules that the model has not.
    """
    qat = config.training.method == "qat"
    if qat:
        prepare(model, Scheme(config.qat.scheme, config.qat.group_size))
    if config.trains_base:
        return model.requires_grad_(True)
    with quiet_transformers():
        from peft import LoraConfig, get_peft_model

    lora, source = config.lora, source_of(model)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if isinstance(targets, list):
        _check_targets(model, targets)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
        use_rslora=lora.use_rslora, use_dora=lora.use_dora, revision=source.revision if source else None,
    )  # fmt: skip
    with _seeded(config.training.seed), quiet_transformers():
        adapted = get_peft_model(model, settings)
    if qat:
        join_adapter(adapted)
    return adapted


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import torch

    # PEFT draws on the CPU whatever the model's device; torch.manual_seed would reach the GPUs too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    """PEFT skips a name that matches nothing as long as another one does."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    paths = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    unknown = [name for name in targets if not any(f".{path}".endswith(f".{name}") for path in paths)]
    if unknown:
        names = sorted({path.rpartition(".")[2] for path in paths})
        close = get_close_matches(unknown[0], names, n=3, cutoff=0.5) or names
        raise ConfigError(
            f"no layer of the model is called {', '.join(map(repr, unknown))}", where="lora.target_modules",
            fix=f"did you mean {', '.join(close)}?",
        )  # fmt: skip


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained, in the model's own order; a shared one comes once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def enable_checkpointing(model: Any, layers: bool | int = True) -> None:
    """Recompute each layer in the backward pass, or so many of the first.

    Not reentrant: frozen inputs need no gradient for it. The first: see `llamahome.memory.recompute`.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    if layers is True:
        return
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    kept: list[Any] = decoder_layers(causal)[layers:]
    for layer in kept:
        layer.gradient_checkpointing = False


@contextmanager
def without_input_casts(model: Any, active: bool) -> Iterator[None]:
    """Under autocast adapters need no fp32 copy of their input, which PEFT makes for each of them.

    Keep it over forward and backward: activation checkpointing runs the forward pass again.
    """
    if not active or not hasattr(model, "peft_config"):
        yield
        return
    from peft.helpers import disable_input_dtype_casting

    with disable_input_dtype_casting(model):
        yield


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names in PEFT's files, contiguous, without the base model's."""
    from peft import get_peft_model_state_dict

    # PEFT's "auto" asks the hub for the base model's vocabulary.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def check_adapter_matches(model: PeftModel, folder: Path) -> None:
    """Compare the adapter in `folder` with the one in `model`: names, shapes, and the base both stand on.

    Raises: ModelError that names the first differences.
    """
    _check_base(model, folder)
    found: Header = {}
    for path in weight_files(folder, stem="adapter_model"):
        found |= read_header(path)
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()}
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} has no place in the model" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name} is {list(found[name][1])} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name][1] != shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ModelError(
            f"the adapter does not fit the model: {', '.join(faults[:3])}{more}", where=str(folder),
            fix="use the base model and the LoRA settings that it was trained with",
        )  # fmt: skip


def _check_base(model: Any, folder: Path) -> None:
    record, source = folder / BASE_RECORD, source_of(model)
    if source is None or not record.exists():
        return
    content = read_json(record)
    if content.get("base_fingerprint") not in (None, model_fingerprint(source.folder)):
        raise ModelError(
            f"the adapter was trained on another base ({content.get('base_model')}), not on {source.name}",
            where=str(folder), fix=f"name that base with --model; or delete {BASE_RECORD} to go without this check",
        )  # fmt: skip


def read_adapter(model: PeftModel, folder: Path) -> None:
    """Put the adapter of `folder` in place of the one in `model`. Raises: ModelError when it does not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    check_adapter_matches(model, folder)
    for path in weight_files(folder, stem="adapter_model"):
        set_peft_model_state_dict(model, load_file(path))


def attach_adapter(model: Any, folder: Path) -> PeftModel:
    """The base model with the LoRA adapter of `folder` on it, frozen. Raises: ModelError."""
    with quiet_transformers():
        from peft import LoraConfig, PeftModel

    path = folder / ADAPTER_CONFIG
    if (kind := read_json(path).get("peft_type")) != "LORA":
        raise ModelError(f"an adapter of the type {kind!r}, not LORA", where=str(path), fix="name a LoRA adapter")
    try:
        with _seeded(0), quiet_transformers():
            adapted = PeftModel(model, LoraConfig.from_pretrained(folder))
    except Exception as error:  # PEFT has many types for a configuration that does not fit
        if is_oom(error):
            raise
        raise ModelError(f"does not fit the model: {error}", where=str(path), fix="name its base model") from error
    read_adapter(adapted, folder)
    return adapted.requires_grad_(False).eval()


def base_is_quantized(folder: Path) -> bool:
    """Whether the adapter in `folder` was trained on a base in 4 bits, as its record says."""
    record = folder / BASE_RECORD
    return record.exists() and read_json(record).get("base_weights") == NF4


def scheme_in(folder: Path) -> Scheme | None:
    """What the model or adapter in `folder` was trained to be quantized to, as its record says."""
    record = folder / BASE_RECORD
    found = read_json(record).get("qat") if record.exists() else None
    return scheme_of(found) if found else None


def base_source(folder: Path, settings: ModelSettings, cache_dir: str | Path | None = None) -> ModelSource:
    """Where the base model of the adapter in `folder` is. Raises: ModelError when nothing named is there."""
    record, adapter = folder / BASE_RECORD, read_json(folder / ADAPTER_CONFIG)
    recorded = read_json(record).get("base_model") if record.exists() else None
    if settings.name is not None:
        return resolve_model(settings.name, settings, cache_dir)
    named = (adapter.get("base_model_name_or_path"), recorded)
    names = [name for name in named if isinstance(name, str) and name]
    if not names:
        raise ModelError(f"{ADAPTER_CONFIG} names no base model", where=str(folder), fix="name it with --model")
    if settings.revision is None and isinstance(revision := adapter.get("revision"), str):
        settings = settings.model_copy(update={"revision": revision})
    try:
        return resolve_model(names[0], settings, cache_dir)
    except ModelError:
        if len(names) == 1:
            raise
        return resolve_model(names[1], settings, cache_dir)
