"""The optimizer's step where memory is short: tried once more as long as it has changed nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llamahome.memory.oom import free_memory, is_oom


def update_weights(step: Callable[[], object], optimizer: torch.optim.Optimizer) -> None:
    """Call `step`, which is `optimizer`'s or a loss scaler's; after an out-of-memory free what can be, and once more.

    An optimizer makes its state in its first step, so that is where memory runs out. The gradients are whole, so
    nothing of the step needs to be replayed; state of weights that had none is made anew. Raises: the error when a
    weight or its state has changed: then only a checkpoint is a place to go on from.
    """
    known = set(optimizer.state)
    before = _marks(optimizer, known)
    try:
        step()
        return
    except Exception as error:
        if not is_oom(error) or _marks(optimizer, known) != before:
            raise
    for parameter in set(optimizer.state) - known:
        del optimizer.state[parameter]
    free_memory()
    step()


def _marks(optimizer: torch.optim.Optimizer, known: set[Tensor]) -> list[object]:
    """What differs once a weight or the state of a `known` one has changed: counts of changes in place, plain values.

    Kernels of bitsandbytes change weights without counting that; they count a weight's steps before.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for weight in weights if weight in known for value in optimizer.state[weight].values()]
    return [value._version if isinstance(value, Tensor) else value for value in (*weights, *state)]
