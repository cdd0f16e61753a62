"""The plan held against this machine before the first step: two micro-batches run, the governor learns their peaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from llamahome.data.batch import MicroBatch
from llamahome.errors import MemoryLimitError
from llamahome.memory.governor import MemoryGovernor
from llamahome.memory.oom import OOMHandler, is_oom
from llamahome.model.adapters import without_input_casts
from llamahome.training.loop import TrainingLoop
from llamahome.training.step import Ids, accumulate, seed_step

_PROBES = 2
_TIGHT = 0.5  # share of the limit below which a probe would cost time and change nothing


def calibrate(loop: TrainingLoop) -> Iterator[dict[str, Any]]:
    """Run the longest sample and then a whole micro-batch where memory is tight; yields an event for each.

    Events hold the peak that was predicted before and the one that was measured, in bytes. A probe that runs out of
    memory makes the budget smaller, as a step does. No gradient is left, and steps draw the same random numbers as
    without. Raises: MemoryLimitError when the longest sample alone does not fit.
    """
    governor = loop.governor
    if governor is None or loop.state.step or governor.predict(governor.token_budget) < _TIGHT * governor.limit_bytes:
        return
    handler = OOMHandler(governor)
    for number in range(_PROBES):
        ids = _probe(loop, governor, whole=number > 0)
        tokens = int(loop.batches.store.lengths(ids).sum())
        predicted = governor.predict(tokens)
        failure = try_micro_batch(loop, ids)
        if failure is not None:
            yield from handler.handle(failure, micro_batch_tokens=tokens, step=0)
            continue
        reading = governor.monitor.read()
        measured = reading.peak_bytes + governor.plan.optimizer  # its state comes with the first step
        changed = governor.observe(micro_batch_tokens=tokens, reading=replace(reading, peak_bytes=measured))
        yield {"event": "calibrated", "step": 0, "tokens": tokens, "predicted": predicted, "measured": measured}
        if changed is not None:
            yield {"step": 0, **changed}


def _probe(loop: TrainingLoop, governor: MemoryGovernor, *, whole: bool) -> Ids:
    """The longest sample of the data, or the largest micro-batch of the first step."""
    store = loop.batches.store
    if not whole:
        return np.array([int(store.lengths().argmax())])
    cut = loop.batches.cut(loop.batches.order.samples(0), governor.token_budget)
    return max(cut, key=lambda ids: int(store.lengths(ids).sum()))


def try_micro_batch(loop: TrainingLoop, ids: Ids) -> Exception | None:
    """Forward and backward over the samples `ids`, no gradient left; what went wrong if memory ran out."""
    seed_step(loop.state.seed, 0)
    if loop.governor is not None:
        loop.governor.monitor.reset_peak()
    trained = max(1, loop.batches.trained_tokens(ids))
    try:
        with without_input_casts(loop.model, loop.precision.lowers):
            accumulate(partial(_forward, loop), [ids], loop.batches.processor.build, trained)
    except Exception as error:
        if isinstance(error, MemoryLimitError) or not is_oom(error):
            raise
        return error.with_traceback(None)  # the frames hold the activations
    finally:
        loop.optimizer.zero_grad(set_to_none=True)
    return None


def _forward(loop: TrainingLoop, batch: MicroBatch) -> Tensor:
    loop.model.train()
    with loop.precision.autocast():
        return loop.objective(batch)
