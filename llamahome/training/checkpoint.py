"""Checkpoints: complete or absent, checked when read, free of pickle.

`checkpoint-N/` holds the model or adapter in its usual layout, `optimizer.safetensors`, `rng.safetensors`,
`training_state.json` and, written last, `manifest.json` with the size and SHA-256 of every other file.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llamahome.errors import CheckpointError
from llamahome.files import publish_folder, remove_folder, sha256, storage_errors, write_json
from llamahome.training.low_bit import make_state, put_together, take_apart

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_SUPERSEDED = ".superseded"
_REQUIRED = ("rng.safetensors", "training_state.json")
PARTS = "shards"  # folder of the ranks' parts, where weights and optimizer were shared out
Sums = dict[str, str]  # SHA-256 by file


@dataclass
class TrainingState:
    """Where a run stands; with the seed it fixes every sample still to come."""

    step: int = 0
    total_steps: int = 0
    samples_per_step: int = 0
    seed: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    threads: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    data_fingerprint: str = ""
    model_fingerprint: str = ""
    shuffle: bool = True
    choices: dict[str, Any] = field(default_factory=dict)
    skipped_samples: list[int] = field(default_factory=list)  # left out since a return to a checkpoint
    recent_losses: list[float] = field(default_factory=list)  # kept for optimization.spike_factor alone


def save_checkpoint(
    run: Path, state: TrainingState, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, scheduler: Any,
    scaler: Any = None,
) -> Path:  # fmt: skip
    """Write `checkpoint-<step>` into the folder `run`. Raises: StorageError, with nothing left behind."""
    from llamahome.model.export import write_model

    target = run / f"checkpoint-{state.step}"
    with publish_folder(target) as folder:
        write_model(model, tokenizer, folder)
        tensors, plain = pack_optimizer(model, optimizer)
        save_file(tensors, folder / "optimizer.safetensors")
        write_state(folder, state, optimizer, scheduler, scaler, plain)
        write_manifest(folder, state.step)
    return target


def write_state(
    folder: Path, state: TrainingState, optimizer: torch.optim.Optimizer, scheduler: Any, scaler: Any,
    values: dict[str, Any],
) -> None:  # fmt: skip
    """Everything of a checkpoint but the tensors of model and optimizer; `values` are the optimizer's other values."""
    random_tensors, random_plain = pack_rng()
    save_file(random_tensors, folder / "rng.safetensors")
    content = {
        **asdict(state),
        "optimizer": {"type": type(optimizer).__name__, "values": values, "groups": group_values(optimizer)},
        "scheduler": {"last_epoch": scheduler.last_epoch},
        "scaler": scaler.state_dict() if scaler is not None else {},
        "rng": random_plain,
    }
    write_json(folder / "training_state.json", content)


def write_manifest(folder: Path, step: int, known: Mapping[str, str] | None = None) -> None:
    """List every file of `folder` with size and SHA-256, which is computed unless it is `known`."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    sums = known or {}
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sums.get(name) or sha256(path)} for name, path in names.items()
    }
    write_json(folder / "manifest.json", {"format": FORMAT_VERSION, "step": step, "files": files})


def fault_of(checkpoint: Path, *, content: bool = True) -> str | None:
    """What is wrong with a checkpoint on disk, or None when every byte is as it was written.

    Without `content` only names and sizes are compared, which costs nothing.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT_VERSION:
            return f"format {manifest['format']} is not {FORMAT_VERSION}"
        if _step(checkpoint) not in (-1, manifest["step"]):
            return f"it is of step {manifest['step']}"
        if not any(name == "optimizer.safetensors" or name.startswith(f"{PARTS}/") for name in manifest["files"]):
            return "manifest.json does not list optimizer.safetensors"
        if missing := [name for name in _REQUIRED if name not in manifest["files"]]:
            return f"manifest.json does not list {missing[0]}"
        for name, expected in manifest["files"].items():
            path = checkpoint / name
            if not path.resolve().is_relative_to(checkpoint.resolve()):
                return f"{name} leaves the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if content and sha256(path) != expected["sha256"]:
                return f"{name} is damaged (SHA-256 differs)"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest step first, good or not."""
    found = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def run_of(path: Path) -> Path:
    """The run folder that `path` is, or that holds the checkpoint `path`.

    Raises: CheckpointError when it is neither.
    """
    path = path.expanduser().resolve()
    if not path.is_dir():
        raise CheckpointError("no such folder", where=str(path), fix="name a run or checkpoint folder")
    if _is_checkpoint(path):
        return path.parent
    if not checkpoints(path):
        raise CheckpointError("it holds no checkpoint-N folder", where=str(path), fix="name a run or checkpoint folder")
    return path


def model_folder(path: Path) -> Path:
    """`path`; of a run's folder its model, which is `final` or, before the run's end, the newest good checkpoint.

    Raises: CheckpointError when a run has neither.
    """
    if not (path / "run.json").is_file():
        return path
    return path / "final" if (path / "final").is_dir() else newest_good(path)


def newest_good(path: Path) -> Path:
    """The newest good checkpoint of the run folder `path`; of a checkpoint itself, or the newest good one before it.

    Raises: CheckpointError when there is none, with the fault of each.
    """
    run, path = run_of(path), path.expanduser().resolve()
    candidates = checkpoints(run)
    if path != run:
        candidates = [*(other for other in candidates if _step(other) < _step(path)), path]
    faults = []
    for candidate in reversed(candidates):
        fault = fault_of(candidate)
        if fault is None:
            return candidate
        faults.append(f"{candidate.name}: {fault}")
        if len(faults) < len(candidates):
            logger.warning("%s is not usable (%s); trying the one before", candidate, fault)
    raise CheckpointError(
        f"no usable checkpoint: {'; '.join(faults)}", where=str(run), fix="start a new run, or restore a copy"
    )


def set_aside_after(checkpoint: Path) -> None:
    """Rename the run's checkpoints of later steps: it goes on from this one, and they are no part of it any more."""
    for path in checkpoints(checkpoint.parent):
        if 0 <= _step(checkpoint) < _step(path):
            target = path.with_name(path.name + _SUPERSEDED)
            with storage_errors(path):
                remove_folder(target)
                path.rename(target)
            logger.warning("%s is set aside as %s: the run goes on from %s", path.name, target.name, checkpoint.name)


def load_state(checkpoint: Path) -> tuple[TrainingState, dict[str, Any]]:
    """The state, and the parts of optimizer, schedule and random numbers that are no tensors."""
    try:
        content = json.loads((checkpoint / "training_state.json").read_bytes())
        rest = {key: content.pop(key) for key in ("optimizer", "scheduler", "scaler", "rng")}
        return TrainingState(**content), rest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot be read: {error}", where=str(checkpoint / "training_state.json"), fix="resume from another one"
        ) from error


def restore(
    checkpoint: Path, rest: dict[str, Any], model: Any, optimizer: torch.optim.Optimizer, scheduler: Any,
    scaler: Any = None,
) -> None:  # fmt: skip
    """Load weights, optimizer, schedule and random state. Raises: CheckpointError when something does not match."""
    from llamahome.model.export import read_weights

    read_weights(model, checkpoint)
    check_optimizer(checkpoint, rest, optimizer)
    tensors = load_file(checkpoint / "optimizer.safetensors")
    unpack_optimizer(model, optimizer, tensors, rest["optimizer"]["values"])
    restore_rest(checkpoint, rest, optimizer, scheduler, scaler)


def check_optimizer(checkpoint: Path, rest: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raises: CheckpointError when the checkpoint's optimizer is of another kind."""
    saved, used = rest["optimizer"]["type"], type(optimizer).__name__
    if saved != used:
        raise CheckpointError(
            f"the optimizer's state is {saved}'s, not {used}'s", where=str(checkpoint),
            fix="resume with the run's optimization.optimizer",
        )  # fmt: skip


def restore_rest(
    checkpoint: Path, rest: dict[str, Any], optimizer: torch.optim.Optimizer, scheduler: Any, scaler: Any
) -> None:
    """Load what is no tensor of model or optimizer: counts, schedule and random state."""
    for group, values in zip(optimizer.param_groups, rest["optimizer"]["groups"], strict=True):
        group.update(values)
    scheduler.last_epoch = rest["scheduler"]["last_epoch"]
    for group, base, shape in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * shape(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if scaler is not None and rest["scaler"]:
        scaler.load_state_dict(rest["scaler"])
    unpack_rng(load_file(checkpoint / "rng.safetensors"), rest["rng"])


def retain(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` good checkpoints; damaged ones do not count and stay."""
    good = [path for path in checkpoints(run) if fault_of(path, content=False) is None]
    for path in good[: max(0, len(good) - keep_last)]:
        try:
            remove_folder(path)
        except OSError as error:
            logger.warning("cannot delete the old %s: %s", path, error)


def pack_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by `parameter name|state name`, and the rest as plain values."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for name, parameter in _trained(model):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors |= {f"{name}|{part}": tensor for part, tensor in take_apart(key, value.detach()).items()}
            else:
                plain[f"{name}|{key}"] = value
    return _each_alone(tensors), plain


def _each_alone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous, and copied where some share memory, as tables of 8-bit optimizers do: safetensors refuses that."""
    users = Counter(tensor.data_ptr() for tensor in tensors.values())
    return {
        name: tensor.clone() if users[tensor.data_ptr()] > 1 else tensor.contiguous()
        for name, tensor in tensors.items()
    }


def unpack_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], plain: dict[str, Any]
) -> None:
    """Put back what `pack_optimizer` gave. Raises: CheckpointError on names or shapes that do not fit."""
    parameters = dict(_trained(model))
    make_state(optimizer)
    for full_name, value in {**tensors, **plain}.items():
        name, _, key = full_name.rpartition("|")
        parameter = parameters.get(name)
        if parameter is None or not _fits(optimizer, key, value, parameter):
            raise CheckpointError(
                f"optimizer state {full_name!r} does not fit this model",
                where="optimizer.safetensors", fix="resume with the model, method and LoRA settings of the run",
            )  # fmt: skip
        # A fused optimizer counts its steps on the parameter's device.
        if isinstance(value, torch.Tensor) and (value.dim() or optimizer.defaults.get("fused")):
            value = value.to(parameter.device)
        _set_state(optimizer.state[parameter], key, value)
    for parameter in parameters.values():
        put_together(optimizer, parameter)


def _set_state(state: dict[str, Any], key: str, value: Any) -> None:
    """Into the tensor that is there, which may be a paged one, or as a new one."""
    known = state.get(key)
    if isinstance(value, torch.Tensor) and isinstance(known, torch.Tensor):
        known.copy_(value)
    else:
        state[key] = value


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What some optimizers count in their parameter groups; settings follow from the configuration instead."""
    settings = {"params", "lr", "initial_lr", "weight_decay", "betas", "eps", "momentum"}
    kinds = (bool, int, float, str, list)
    return [
        {key: value for key, value in group.items() if key not in settings and isinstance(value, kinds)}
        for group in optimizer.param_groups
    ]


def _fits(optimizer: torch.optim.Optimizer, key: str, value: Any, parameter: torch.Tensor) -> bool:
    """Whether a state has the shape of the one there, or that torch and torchao give it; others know their own."""
    known = optimizer.state.get(parameter, {}).get(key)
    if isinstance(value, torch.Tensor) and isinstance(known, torch.Tensor):
        return value.shape == known.shape
    package = type(optimizer).__module__.partition(".")[0]
    if not isinstance(value, torch.Tensor) or package not in {"torch", "torchao"} or "." in key:
        return True
    shape = parameter.shape
    if key == "step":
        return value.dim() == 0
    if isinstance(optimizer, torch.optim.Adafactor) and len(shape) > 1:
        return list(value.shape) == {"row_var": [*shape[:-1], 1], "col_var": [*shape[:-2], 1, shape[-1]]}.get(key)
    return value.shape == shape


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    from llamahome.model.adapters import trainable_parameters

    return iter(trainable_parameters(model))


def pack_rng() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Random states of torch (as tensors), Python and NumPy (as plain values)."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    numpy_state = [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]
    return tensors, {"python": [version, list(internal), gauss], "numpy": numpy_state}


def unpack_rng(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _is_checkpoint(path: Path) -> bool:
    return bool(_NAME.fullmatch(path.name)) or (path / "training_state.json").exists()


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1
