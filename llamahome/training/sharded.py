"""Checkpoints and models of a run whose weights are shared out over the ranks: each rank writes and reads its part.

Parts are written by torch.distributed.checkpoint in its safetensors storage, under `shards/`; the names in them are
those of the plain format, and the reader takes both, so that any number of ranks goes on from any checkpoint. The
library's own metadata is pickled and never written or read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamahome.distributed.ranks import Ranks
from llamahome.distributed.shard import whole
from llamahome.errors import CheckpointError, StorageError
from llamahome.files import publish_folder, sha256, storage_errors, sync_folder, write_json
from llamahome.model.adapters import trainable_parameters
from llamahome.training.checkpoint import PARTS, Sums

INDEX = "model.safetensors.index.json"
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@contextmanager
def publish_together(path: Path, ranks: Ranks) -> Iterator[tuple[Path, Sums]]:
    """A folder that all ranks fill and rank 0 publishes once every rank's files are on disk; all or nothing.

    Gives the folder, which must be on storage that all ranks share, and on leaving what `write_manifest` wants: the
    SHA-256 of the files of all ranks, each taken by the rank that wrote it, in the mapping that was given.
    Raises: StorageError on every rank when one of them fails.
    """
    manager = publish_folder(path) if ranks.is_main else None
    folder = Path(ranks.decide(lambda: str(manager.__enter__()) if manager else "", "begin a checkpoint"))
    sums: Sums = {}
    fault: BaseException | None = None
    try:
        with storage_errors(path):
            yield folder, sums
    except BaseException as error:
        fault = error
    faults = ranks.gather(None if fault is None else str(fault) or type(fault).__name__)
    broken = next((f"rank {rank}: {text}" for rank, text in enumerate(faults) if text is not None), None)
    if broken is not None:
        reason = fault or StorageError(f"not written, {broken}", where=str(path), fix="see the message of that rank")
        if manager is not None:
            manager.__exit__(type(reason), reason, reason.__traceback__)
        raise reason
    ranks.decide(lambda: manager.__exit__(None, None, None) if manager else None, "publish a checkpoint")


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], ranks: Ranks, sums: Sums) -> None:
    """This rank's parts of the tensors, durable, into `folder/shards`; `sums` gets the SHA-256 of all ranks' files."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    target = folder / PARTS
    target.mkdir(exist_ok=True)
    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(target), save_distributed=True))
    except CheckpointException as error:  # no subclass of Exception
        raise StorageError(f"cannot write: {_reason(error)}", where=str(folder), fix="check the disk") from error
    own = target.glob(f"shard-{ranks.rank + 1:05d}-*.safetensors")
    digests = ranks.gather({f"{PARTS}/{path.name}": sha256(path) for path in own})
    for found in digests:
        sums.update(found)


def read_shards(checkpoint: Path, targets: Mapping[str, torch.Tensor], *, alone: bool) -> None:
    """Fill tensors, or this rank's parts of them, from a checkpoint in either format. `alone`: without other ranks.

    Raises: CheckpointError for names or shapes that the checkpoint does not have.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    source = checkpoint / PARTS if (checkpoint / PARTS).is_dir() else checkpoint
    reader = HuggingFaceStorageReader(str(source))
    known = reader.read_metadata().state_dict_metadata
    for name, tensor in targets.items():
        size = getattr(known.get(name), "size", None)
        if size != tensor.shape:
            found = "missing" if size is None else f"{list(size)} instead of {list(tensor.shape)}"
            raise CheckpointError(f"{name} is {found}", where=str(source), fix="resume with the run's own settings")
    try:
        load(dict(targets), storage_reader=HuggingFaceStorageReader(str(source)), no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(f"cannot be read: {_reason(error)}", where=str(source), fix="use another one") from error


def model_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What of the model is saved, by its names in files: the adapter, or every weight once."""
    if hasattr(model, "peft_config"):
        return {file_name(name): parameter.detach() for name, parameter in trainable_parameters(model)}
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def file_name(name: str) -> str:
    """PEFT's files leave out the adapter's own name."""
    return name.replace(".default.", ".")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state that has a parameter's shape, by `parameter name|state name`."""
    return {
        f"{name}|{key}": value
        for name, parameter in trainable_parameters(model)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor) and value.dim()
    }


def prepare_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, names: Mapping[str, float]) -> None:
    """Empty state for the tensors of a checkpoint; `names` are all of its states, with the value of those of one."""
    parameters = dict(trainable_parameters(model))
    for full_name, value in names.items():
        name, _, key = full_name.rpartition("|")
        if (parameter := parameters.get(name)) is None:
            raise CheckpointError(f"optimizer state {full_name!r} does not fit this model",
                                  fix="resume with the model and method of the run")  # fmt: skip
        device = parameter.device if optimizer.defaults.get("fused") else "cpu"
        scalar = torch.tensor(value, dtype=torch.float32, device=device)
        optimizer.state[parameter][key] = scalar if key == "step" else torch.zeros_like(parameter)


def write_whole_model(model: nn.Module, folder: Path, ranks: Ranks) -> None:
    """All weights in transformers' layout, one file a rank; no rank ever holds more than one whole tensor.

    Every rank writes neighbouring tensors of about the same size together.
    """
    tensors = model_tensors(model)
    owners = _owners(tensors, ranks.size)
    count = max(owners.values()) + 1
    names = {rank: f"model-{rank + 1:05d}-of-{count:05d}.safetensors" for rank in range(count)}
    own = {name: tensor for name, tensor in tensors.items() if owners[name] == ranks.rank}
    writer = _Writer(folder / names[ranks.rank], own) if own else None
    try:
        for name, tensor in tensors.items():
            full = whole(tensor)
            if writer is not None and name in own:
                writer.write(full)
            del full
    finally:
        if writer is not None:
            writer.close()
    if ranks.is_main:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        files = {name: names[owner] for name, owner in owners.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files})


class _Writer:
    """A safetensors file written tensor by tensor, in the order of `tensors`, whose shapes and types are known."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._path = path
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: torch.Tensor) -> None:
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sync_folder(self._path.parent)


def _owners(tensors: Mapping[str, torch.Tensor], ranks: int) -> dict[str, int]:
    """The rank that writes each tensor: neighbours together, about equal bytes."""
    total = sum(tensor.numel() for tensor in tensors.values())
    owners, before = {}, 0
    for name, tensor in tensors.items():
        owners[name] = min(ranks - 1, before * ranks // max(1, total))
        before += tensor.numel()
    used = {old: new for new, old in enumerate(sorted(set(owners.values())))}
    return {name: used[owner] for name, owner in owners.items()}


def _reason(error: Any) -> str:
    """The first rank's fault in torch's collection of them."""
    for rank, (cause, _) in getattr(error, "failures", {}).items():
        return f"rank {rank}: {cause}"
    return str(error)
