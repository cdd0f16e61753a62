"""An optimizer of your own: Lion (Chen et al. 2023), the sign of a momentum, half the state of Adam.

    llamahome train data.jsonl --set optimization.optimizer=examples.custom_optimizer:lion

Any `torch.optim.Optimizer` will do: its state is saved in checkpoints, and its groups get their learning rate.
"""

from __future__ import annotations

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """`p -= lr * (sign(b1 * m + (1 - b1) * g) + decay * p)`, then `m = b2 * m + (1 - b2) * g`."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = momentum.lerp(p.grad, 1 - first).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - second)


def lion(groups: list[dict[str, Any]], settings: Any) -> Lion:
    """From the two parameter groups, with and without weight decay, and the section `optimization`."""
    return Lion(groups, settings.learning_rate, (0.9, 0.99))
