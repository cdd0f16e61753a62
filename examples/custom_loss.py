"""A loss of your own: cross-entropy with smoothed labels and a penalty on large logits.

    llamahome train data.jsonl --set training.loss=examples.custom_loss:smoothed

The engine hands over the decoder's outputs at the trained tokens only and divides the sum that you return by the
trained tokens of the whole step, so the result does not depend on how the step was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def smoothed(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None, logit_scale: float, softcap: float,
    reduction: str,
) -> Tensor:  # fmt: skip
    """Summed loss of `hidden` [N, h] against `labels` [N]; the logits of 256 rows exist at a time."""
    assert reduction == "sum"
    assert not softcap

    def chunk(h: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, weight, bias).float() * logit_scale
        penalty = 1e-4 * logits.logsumexp(-1).square().sum()
        return F.cross_entropy(logits, y, reduction="sum", label_smoothing=0.1) + penalty

    total = hidden.new_zeros((), dtype=torch.float32)
    for h, y in zip(hidden.split(256), labels.split(256), strict=True):
        total = total + checkpoint(chunk, h, y, use_reentrant=False)
    return total
