"""Optimizer and learning-rate schedule, chosen by name or import path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from llamahome.config import OptimizationSettings
from llamahome.errors import ConfigError
from llamahome.memory.oom import is_oom
from llamahome.plugins import load_object, name_of
from llamahome.training.callbacks import own_code
from llamahome.training.low_bit import LOW_BIT, build_low_bit


class Schedule(Protocol):
    """Factor on the learning rate before optimizer step `step` (from 0) of `total`."""

    def __call__(self, step: int, total: int, warmup: int) -> float: ...


class OptimizerFactory(Protocol):
    """Makes the optimizer from the two parameter groups (with and without weight decay) and the settings."""

    def __call__(self, groups: list[dict[str, Any]], settings: OptimizationSettings, /) -> torch.optim.Optimizer: ...


def constant(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then constant."""
    return step / warmup if step < warmup else 1.0


def linear(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then linear decay to 0 at the last step."""
    return step / warmup if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to 0 (SGDR without restarts, arXiv 1608.03983)."""
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(step: int, total: int, warmup: int, decay_ratio: float = 0.2) -> float:
    """Linear warm-up, constant, then linear decay over the last `decay_ratio` of the steps (arXiv 2404.06395)."""
    decay = max(1, round(total * decay_ratio))
    return min(constant(step, total, warmup), max(0.0, (total - step) / decay))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "warmup_stable_decay": warmup_stable_decay,
}

Groups = Iterable[dict[str, Any]]
OPTIMIZERS: dict[str, Callable[[Groups, OptimizationSettings], torch.optim.Optimizer]] = {
    "adamw": lambda groups, s: torch.optim.AdamW(
        groups, lr=s.learning_rate, betas=(s.betas[0], s.betas[1]), eps=s.eps, fused=True
    ),
    "sgd": lambda groups, s: torch.optim.SGD(groups, lr=s.learning_rate, momentum=s.betas[0]),
    "adafactor": lambda groups, s: torch.optim.Adafactor(groups, lr=s.learning_rate),
    **{name: partial(build_low_bit, chosen) for name, chosen in LOW_BIT.items()},
}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; norms, biases and other vectors do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trainable if p.dim() > 1], [p for p in trainable if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, settings: OptimizationSettings, factory: OptimizerFactory | None = None
) -> torch.optim.Optimizer:
    """The optimizer over `model`'s trainable parameters.

    An optimizer of the user's own (`factory`, or a name) is called with the two parameter groups and the settings.
    Raises: ConfigError when it is unknown or fails.
    """
    name = name_of(factory) if factory else settings.optimizer
    build = load_object(factory or settings.optimizer, key="optimization.optimizer", known=OPTIMIZERS)
    try:
        optimizer = build(decay_groups(model, settings.weight_decay), settings)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"it gave {type(optimizer).__name__}, not a torch.optim.Optimizer")
    except Exception as error:  # the user's own code may raise anything
        if is_oom(error):
            raise
        raise ConfigError(
            f"{name} cannot be built: {error}", where="optimization.optimizer",
            fix="name a function of the parameter groups and the optimization settings",
        ) from error  # fmt: skip
    return optimizer


def resolve_warmup(settings: OptimizationSettings, total_steps: int) -> int:
    """Warm-up steps: the count asked for, a share of the run (below 1), or by default 100 and at most a tenth."""
    asked = settings.warmup_steps
    if asked is None:
        return min(100, total_steps // 10)
    return round(asked * total_steps) if 0 < asked < 1 else int(asked)


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: OptimizationSettings, total_steps: int, shape: Schedule | None = None
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule over `total_steps` optimizer steps, never below `min_lr_ratio` after the warm-up.

    `shape` stands in for `optimization.scheduler_type`.
    """
    chosen = load_object(shape or settings.scheduler_type, key="optimization.scheduler_type", known=SCHEDULES)
    warmup = resolve_warmup(settings, total_steps)
    extra = {"decay_ratio": settings.decay_ratio} if chosen is warmup_stable_decay else {}
    low = settings.min_lr_ratio

    def factor(step: int) -> float:
        with own_code(chosen, "optimization.scheduler_type"):
            value = float(chosen(step, total_steps, warmup, **extra))
        if not math.isfinite(value):
            raise ConfigError(f"the schedule gave {value} at step {step}", where="optimization.scheduler_type")
        return value if step < warmup else low + (1 - low) * value

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
