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
    known, versions = set(optimizer.state), _versions(optimizer)
    try:
        step()
        return
    except Exception as error:
        if not is_oom(error) or any(tensor._version != version for tensor, version in versions):
            raise
    for parameter in set(optimizer.state) - known:
        del optimizer.state[parameter]
    free_memory()
    step()


def _versions(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, int]]:
    """Every weight and tensor of state with the number of its changes in place so far."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return [(tensor, tensor._version) for tensor in (*weights, *state)]
