"""The memory contract of a run: its plan on this machine, and the governor that holds the limit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamahome.config import Config
from llamahome.data.store import TokenStore
from llamahome.errors import ConfigError
from llamahome.memory.agree import kept_budget
from llamahome.memory.governor import ENOUGH_TOKENS, MemoryGovernor
from llamahome.memory.ladder import Machine, Workload, choose_plan
from llamahome.memory.monitor import MemoryMonitor, resolve_limit
from llamahome.memory.oom import free_memory
from llamahome.model.fuse import knows
from llamahome.model.quiet import quiet_transformers
from llamahome.training.checkpoint import TrainingState
from llamahome.training.precision import Precision

logger = logging.getLogger(__name__)


def build_governor(
    config: Config, architecture: dict[str, Any], store: TokenStore, state: TrainingState, precision: Precision,
    device: torch.device, run: Path, ranks: int = 1,
) -> MemoryGovernor:  # fmt: skip
    """The governor of a run in the folder `run`, by the first plan of the ladder that fits.

    It goes on where `state` left it, below a budget that a rank kept in `run` when it ran out of memory.
    Raises: MemoryLimitError when nothing fits; ConfigError for what unfused layers cannot do.
    """
    monitor = MemoryMonitor(str(device))
    limit = resolve_limit(config, str(device), monitor)
    work = workload(store, state.samples_per_step)
    fused = config.processing.fuse and knows(architecture.get("model_type"))
    if config.processing.gradient_checkpointing == "mlp" and not fused:
        raise ConfigError("only fused layers can make their MLPs' products alone again",
                          where="processing.gradient_checkpointing", fix="set it to true")  # fmt: skip
    machine = Machine(device.type, limit, ranks, process_bytes=_held_already(monitor))
    plan = choose_plan(architecture, config, machine, work, precision=precision.name, fused=fused).plan
    most = kept_budget(run)
    if most is not None:
        logger.info("at most %d tokens in a micro-batch, since an earlier try ran out of memory", most)
        most = min(most, ENOUGH_TOKENS[device.type])
    governor = MemoryGovernor(
        limit, plan, monitor, longest_sample=work.longest, step_tokens=work.step_tokens, maximum=most
    )
    if state.plan:
        governor.load_state_dict(state.plan)
    return governor


def _held_already(monitor: MemoryMonitor) -> int:
    """Bytes of this process before the model is there, with the libraries that are loaded with it."""
    with quiet_transformers():
        import peft  # noqa: F401
    free_memory()
    return monitor.read().used_bytes


def workload(store: TokenStore, samples_per_step: int, steps: int = 0) -> Workload:
    """What a plan must know of the samples; `tokens` are those of `steps` steps on average."""
    lengths = store.lengths()
    longest = int(lengths.max())
    return Workload(
        longest=longest,
        step_tokens=max(longest, int(np.sort(lengths)[-samples_per_step:].sum())),
        tokens=round(steps * samples_per_step * float(lengths.mean())),
        trained_fraction=store.num_trained / store.num_tokens,
    )
