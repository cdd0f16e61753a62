"""What would end a run in an hour, tried before its first step: checkpoint, disk, longest sample; and the time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from llamahome.config import Config, parse_size
from llamahome.data.encoding import Encoded
from llamahome.data.prepare import show_trained
from llamahome.errors import MemoryLimitError, StorageError
from llamahome.files import remove_folder
from llamahome.memory.monitor import format_bytes
from llamahome.model.adapters import adapter_state
from llamahome.monitor.progress import duration
from llamahome.training import checkpoint as checkpoints
from llamahome.training.calibrate import calibrate, try_micro_batch
from llamahome.training.loop import TrainingLoop
from llamahome.training.rundir import RunFolder, trial_folder
from llamahome.training.setup import Assembled, assemble
from llamahome.training.step import Ids

logger = logging.getLogger(__name__)
_SHOWN = 240  # characters of the first sample
_CHEAP = 2.0  # seconds that a better estimate of the time may cost


def preflight(config: Config, parts: Assembled, folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Try what the run is going to do, and say how it went; yields the events, the last one called `preflight`.

    A checkpoint is saved into the run's folder, read back, compared bit by bit and deleted; the disk must hold those
    that the run keeps; the longest sample goes through the model once. Costs one checkpoint and a few samples, and
    changes nothing: the steps have the same bits as without.

    Raises: StorageError, MemoryLimitError.
    """
    began = time.perf_counter()
    found: dict[str, Any] = {"event": "preflight", "step": parts.loop.state.step}
    logger.info("first sample, the trained part in brackets: %s", _first_sample(parts))
    if not _several_ranks():  # there, a checkpoint is saved by all together
        found |= _checkpoint(config, parts, folder)
    if not parts.loop.state.step:
        yield from calibrate(parts.loop)
        found |= _longest(parts)
    found["seconds"] = time.perf_counter() - began
    logger.info("preflight done in %.1f s", found["seconds"])
    yield found


def dry_run(config: Config) -> dict[str, Any]:
    """The preflight alone: nothing is trained, and no folder is left behind; returns the event `preflight`.

    Raises: any LlamaHomeError that `train` would raise before its first step.
    """
    with trial_folder(Path(config.training.output)) as folder:
        parts = assemble(config, folder, None)
        try:
            *_, found = preflight(config, parts, folder)
        finally:
            parts.prepared.close()
    return found


def _first_sample(parts: Assembled) -> str:
    """Where it is, its beginning and its end: a wrong template or column is seen here."""
    store = parts.prepared.train
    text = show_trained(Encoded(*store.document(0)), parts.tokenizer)
    short = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    return f"{parts.loop.batches.place(0)}: {short}"


def _checkpoint(config: Config, parts: Assembled, folder: RunFolder) -> dict[str, Any]:
    """Save, read back, compare; then the disk space that this run will need of it."""
    began = time.perf_counter()
    size = _saved_and_read(parts, folder.path)
    seconds = time.perf_counter() - began
    logger.info(
        "checkpoint: %s saved and read back with the same bits in %.1f s (training.save_steps: every %d steps)",
        format_bytes(size), seconds, config.training.save_steps,
    )  # fmt: skip
    needed = _disk_bytes(config, parts.loop, size)
    folder.require_free(needed + parse_size(config.resource.min_free_disk))
    logger.info("disk: %s needed in %s (training.keep_last: %d)", format_bytes(needed), folder.path,
                config.training.keep_last)  # fmt: skip
    return {"checkpoint_bytes": size, "checkpoint_seconds": seconds, "disk_bytes": needed}


def _saved_and_read(parts: Assembled, run: Path) -> int:
    """Bytes of a checkpoint that was saved into `run`, proved equal to what is in memory, and deleted."""
    loop = parts.loop
    place = run / f".preflight.tmp-{os.getpid()}"  # the name of a leftover, should this process be killed
    try:
        path = checkpoints.save_checkpoint(
            place, loop.state, parts.model, parts.tokenizer, loop.optimizer, loop.scheduler, loop.scaler
        )
        fault = checkpoints.fault_of(path) or _difference(path, _tensors(loop))
        if fault is None and checkpoints.load_state(path)[0] != loop.state:
            fault = "training_state.json says something else"
        if fault is not None:
            raise StorageError(f"a checkpoint is not read back as it was saved: {fault}", where=str(run),
                               fix="check the disk, or choose another --output")  # fmt: skip
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    finally:
        remove_folder(place)


def _tensors(loop: TrainingLoop) -> dict[str, Tensor]:
    """What a checkpoint holds: weights, optimizer's state and random state, by their names in its files."""
    model = loop.model
    weights = adapter_state(model) if hasattr(model, "peft_config") else model.state_dict()
    return {**weights, **checkpoints.pack_optimizer(model, loop.optimizer)[0], **checkpoints.pack_rng()[0]}


def _difference(folder: Path, wanted: Mapping[str, Tensor]) -> str | None:
    """The first tensor on disk that is not, bit for bit, the one of that name in memory; one at a time is read."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safe_open is no dict)
                if name in wanted and not _same_bits(file.get_tensor(name), wanted[name]):
                    return f"{name} in {path.name} differs"
    return None


def _same_bits(saved: Tensor, kept: Tensor) -> bool:
    """NaNs are equal to themselves here."""
    as_bytes = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (saved, kept)]
    return saved.dtype == kept.dtype and torch.equal(*as_bytes)


def _disk_bytes(config: Config, loop: TrainingLoop, saved: int) -> int:
    """What the run's folder grows by: the checkpoints kept and the one being written, `best` and `final`.

    `saved` is the size of one before the first step; the optimizer's state comes with it.
    """
    state = loop.governor.plan.optimizer if loop.governor is not None else 0
    saves = -(-(loop.state.total_steps - loop.state.step) // config.training.save_steps)
    fresh = loop.state.step == 0
    return (min(config.training.keep_last, max(1, saves)) + 1) * (saved + state * fresh) + 2 * saved


def _longest(parts: Assembled) -> dict[str, Any]:
    """The longest sample forward and backward, and from its time (or a whole micro-batch's) that of the run."""
    loop = parts.loop
    store, order = loop.batches.store, loop.batches.order
    lengths = store.lengths()
    longest = np.array([int(lengths.argmax())])
    tokens = int(lengths.max())
    place = loop.batches.place(int(longest[0]))
    timed, seconds = tokens, _timed(loop, longest, place)
    if seconds < _CHEAP:  # the first pass pays for what later ones do not
        seconds = min(seconds, _timed(loop, longest, place))
    budget = loop.governor.token_budget if loop.governor is not None else None
    batch = max(loop.batches.cut(order.samples(0), budget), key=lambda ids: int(lengths[ids].sum()))
    whole = int(lengths[batch].sum())
    if whole > tokens and seconds * whole / tokens < _CHEAP:
        timed, seconds = whole, _timed(loop, batch, "a micro-batch of the first step")
    steps = loop.state.total_steps - loop.state.step
    left = seconds / timed * float(lengths.mean()) * loop.state.samples_per_step * steps
    logger.info("longest sample: %s tokens went through forward and backward", f"{tokens:,}")
    logger.info("about %s for %d steps, without evaluations (%.0f tokens a second)", duration(left), steps,
                timed / seconds)  # fmt: skip
    return {"longest_tokens": tokens, "seconds_left": left, "tokens_per_second": timed / seconds}


def _timed(loop: TrainingLoop, ids: Ids, name: str) -> float:
    """Seconds of a forward and backward. Raises: MemoryLimitError when it runs out of memory."""
    began = time.perf_counter()
    failure = try_micro_batch(loop, ids)
    if failure is not None:
        raise MemoryLimitError(
            f"out of memory with {int(loop.batches.store.lengths(ids).sum())} tokens: {failure}", where=name,
            fix="lower data.max_length, or set processing.gradient_checkpointing: true",
        ) from failure  # fmt: skip
    if loop.precision.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _several_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
