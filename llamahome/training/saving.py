"""Checkpoints and models of a run, whatever the number of its ranks and however they share the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llamahome.distributed.shard import whole
from llamahome.model.adapters import adapter_state, trainable_parameters
from llamahome.model.export import save_model, write_adapter, write_tokenizer
from llamahome.training import checkpoint as checkpoints
from llamahome.training.checkpoint import PARTS, TrainingState
from llamahome.training.sharded import (
    model_tensors,
    optimizer_tensors,
    prepare_optimizer,
    publish_together,
    read_shards,
    write_shards,
    write_whole_model,
)
from llamahome.training.team import Team


def save(
    run: Path, state: TrainingState, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, scheduler: Any,
    scaler: Any, team: Team,
) -> Path:  # fmt: skip
    """Write `checkpoint-<step>`; every rank calls it. Raises: StorageError, DistributedError.

    Under `shard` an adapter is small and comes in the plain format; of a whole model each rank writes its part.
    """
    if team.strategy != "shard":
        return Path(
            team.ranks.decide(
                lambda: str(checkpoints.save_checkpoint(run, state, model, tokenizer, optimizer, scheduler, scaler)),
                "save a checkpoint",
            )
        )
    target = run / f"checkpoint-{state.step}"
    tensors = optimizer_tensors(model, optimizer)
    values = _scalars(model, optimizer) | dict.fromkeys(tensors, 0.0)
    with publish_together(target, team.ranks) as (folder, sums):
        if hasattr(model, "peft_config"):
            _write_plain(folder, model, tokenizer, tensors, optimizer, team)
            values = {}
        else:
            write_shards(folder, {**model_tensors(model), **tensors}, team.ranks, sums)
            if team.ranks.is_main:
                _write_settings(model, tokenizer, folder)
        if team.ranks.is_main:
            checkpoints.write_state(folder, state, optimizer, scheduler, scaler, values)
            checkpoints.write_manifest(folder, state.step, sums)
    return target


def export(model: Any, tokenizer: Any, folder: Path, team: Team) -> None:
    """A plain folder for transformers or PEFT; every rank calls it. No rank holds the whole of a shared model."""
    if team.strategy != "shard":
        team.ranks.decide(lambda: save_model(model, tokenizer, folder), f"write {folder.name}")
        return
    with publish_together(folder, team.ranks) as (temporary, _):
        if hasattr(model, "peft_config"):
            weights = {name: whole(tensor) for name, tensor in adapter_state(model).items()}
            if team.ranks.is_main:
                write_adapter(model, temporary, weights)
                write_tokenizer(tokenizer, temporary)
        else:
            write_whole_model(model, temporary, team.ranks)
            if team.ranks.is_main:
                _write_settings(model, tokenizer, temporary)


def restore(found: Path, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, scaler: Any, team: Team) -> None:
    """Put the checkpoint `found` in place, of whatever format, on any number of ranks. Raises: CheckpointError."""
    _, rest = checkpoints.load_state(found)
    if team.strategy != "shard" and not (found / PARTS).is_dir():
        checkpoints.restore(found, rest, model, optimizer, scheduler, scaler)
        return
    checkpoints.check_optimizer(found, rest, optimizer)
    prepare_optimizer(model, optimizer, _state_names(found, rest))
    targets = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
    read_shards(found, targets, alone=not team.ranks.several)
    checkpoints.restore_rest(found, rest, optimizer, scheduler, scaler)


def _write_plain(
    folder: Path, model: Any, tokenizer: Any, tensors: dict[str, torch.Tensor], optimizer: Any, team: Team
) -> None:
    from safetensors.torch import save_file

    weights = {name: whole(tensor) for name, tensor in adapter_state(model).items()}
    moments = {name: whole(tensor).contiguous() for name, tensor in tensors.items()}
    scalars = {name: torch.tensor(value) for name, value in _scalars(model, optimizer).items()}
    if team.ranks.is_main:
        write_adapter(model, folder, weights)
        write_tokenizer(tokenizer, folder)
        save_file({**moments, **scalars}, folder / "optimizer.safetensors")


def _write_settings(model: Any, tokenizer: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    write_tokenizer(tokenizer, folder)


def _scalars(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The optimizer's counts, by `parameter name|state name`."""
    return {
        f"{name}|{key}": float(value)
        for name, parameter in trainable_parameters(model)
        for key, value in optimizer.state.get(parameter, {}).items()
        if not isinstance(value, torch.Tensor) or not value.dim()
    }


def _state_names(found: Path, rest: dict[str, Any]) -> dict[str, float]:
    """All states of the optimizer in a checkpoint, with the value of its counts."""
    if (found / PARTS).is_dir():
        return dict(rest["optimizer"]["values"])
    from safetensors import safe_open

    with safe_open(found / "optimizer.safetensors", framework="pt") as file:
        names = list(file.keys())
        return {name: float(file.get_tensor(name)) if not file.get_slice(name).get_shape() else 0.0 for name in names}
