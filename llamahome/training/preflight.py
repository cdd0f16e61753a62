"""What would end a run in an hour, tried before its first step: checkpoint, disk, longest sample; and the time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator, Iterator, Mapping
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
from llamahome.memory.oom import OOMHandler, free_memory
from llamahome.model.adapters import adapter_state
from llamahome.monitor.words import duration, short_path
from llamahome.training import checkpoint as checkpoints
from llamahome.training.calibrate import calibrate, try_micro_batch
from llamahome.training.loop import TrainingLoop
from llamahome.training.rundir import RunFolder, trial_folder
from llamahome.training.setup import Assembled, assemble
from llamahome.training.step import Ids

logger = logging.getLogger(__name__)
_SHOWN = 100  # characters before, and in, the trained part of the first sample
_CHEAP = 2.0  # seconds that a better estimate of the time may cost


def preflight(config: Config, parts: Assembled, folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Try what the run is going to do, and say how it went; yields the events, the last one called `preflight`.

    A checkpoint is saved into the run's folder, read back, compared bit by bit and deleted; the disk must hold those
    that the run keeps; the longest sample goes through the model. Costs one checkpoint, the longest sample and at most
    two seconds more, and changes nothing: the steps have the same bits as without, unless memory ran out here.

    Raises: StorageError, MemoryLimitError.
    """
    began = time.perf_counter()
    found: dict[str, Any] = {"event": "preflight", "step": parts.loop.state.step}
    logger.info("first sample, the trained part in ⟦brackets⟧: %s", _first_sample(parts))
    if not _several_ranks():  # there, a checkpoint is saved by all together
        found |= _checkpoint(config, parts, folder)
    if not parts.loop.state.step:
        speed = yield from _calibrated(parts.loop)
        found |= yield from _longest(parts, speed)
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
    """Where it is, and both ends of the prompt and of the rest: a wrong template or column is seen here."""
    store = parts.prepared.train
    text = show_trained(Encoded(*store.document(0)), parts.tokenizer)
    prompt, mark, rest = text.partition("⟦")
    return f"{parts.loop.batches.place(0)}: {_ends(prompt)}{mark}{_ends(rest)}"


def _ends(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


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
    logger.info("disk: %s needed in %s (training.keep_last: %d)", format_bytes(needed), short_path(folder.path),
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


def _calibrated(loop: TrainingLoop) -> Generator[dict[str, Any], None, float | None]:
    """What `calibrate` yields; the tokens a second of its last probe, None where it tried none with success."""
    speed, began = None, time.perf_counter()
    for event in calibrate(loop):
        now = time.perf_counter()
        if event["event"] == "calibrated":
            speed = event["tokens"] / (now - began)
        yield event
        began = now
    return speed


def _longest(parts: Assembled, speed: float | None) -> Generator[dict[str, Any], None, dict[str, Any]]:
    """The longest sample forward and backward, and from its time (or a whole micro-batch's) that of the run.

    With the `speed` of a calibration it has gone through already. Yields the events of a cut made smaller.
    Raises: MemoryLimitError when the longest sample alone does not fit.
    """
    loop = parts.loop
    lengths = loop.batches.store.lengths()
    longest, tokens = np.array([int(lengths.argmax())]), int(lengths.max())
    if speed is None:
        speed = yield from _speed(loop, longest, tokens / _alone(loop, longest, tokens))
    logger.info("longest sample: %s tokens went through forward and backward", f"{tokens:,}")
    steps = loop.state.total_steps - loop.state.step
    left = float(lengths.mean()) * loop.state.samples_per_step * steps / speed
    logger.info("about %s for %d steps, without evaluations (%.0f tokens a second)", duration(left), steps, speed)
    return {"longest_tokens": tokens, "seconds_left": left, "tokens_per_second": speed}


def _alone(loop: TrainingLoop, longest: Ids, tokens: int) -> float:
    """Seconds of the longest sample; tried twice. Raises: MemoryLimitError."""
    seconds, failure = _timed(loop, longest)
    if failure is not None:
        free_memory()
        seconds, failure = _timed(loop, longest)
    if failure is not None:
        raise MemoryLimitError(
            f"out of memory with the longest sample alone, {tokens:,} tokens: {failure}",
            where=loop.batches.place(int(longest[0])),
            fix="lower data.max_length, or set processing.gradient_checkpointing: true",
        ) from failure  # fmt: skip
    return seconds


def _speed(loop: TrainingLoop, longest: Ids, first: float) -> Generator[dict[str, Any], None, float]:
    """Tokens a second of a whole micro-batch, or of the longest sample once more, where seconds are enough for it.

    `first` is the speed of the first pass, which pays for what later ones do not. A micro-batch that runs out of
    memory makes the cut smaller, as in a step, and ends no run.
    """
    lengths, governor = loop.batches.store.lengths, loop.governor
    budget = governor.token_budget if governor is not None else None
    cut = loop.batches.cut(loop.batches.order.samples(0), budget)
    tried = max([longest, *cut], key=lambda ids: int(lengths(ids).sum()))
    if lengths(tried).sum() / first > _CHEAP:
        tried = longest
    tokens = int(lengths(tried).sum())
    if tokens / first > _CHEAP:
        return first
    seconds, failure = _timed(loop, tried)
    if failure is None:
        return max(first, tokens / seconds)
    if governor is not None:
        yield from OOMHandler(governor).handle(failure, micro_batch_tokens=tokens, step=loop.state.step)
    return first


def _timed(loop: TrainingLoop, ids: Ids) -> tuple[float, Exception | None]:
    """Seconds of a forward and backward; and what went wrong if memory ran out."""
    began = time.perf_counter()
    failure = try_micro_batch(loop, ids)
    if loop.precision.device == "cuda" and failure is None:
        torch.cuda.synchronize()
    return time.perf_counter() - began, failure


def _several_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
