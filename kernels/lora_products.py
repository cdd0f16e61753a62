"""The products of a group of LoRA linear layers over one input, forward and backward, without autograd.

The arithmetic of `lora.py`: A matrices laid one upon the other, so that the input is read once, and gradients in an
order that makes no matrix of a weight's size unless the weight itself is trained. Shapes as there; R is the group's
rank in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llamahome.kernels.nf4 import Nf4Weight, dequantize
from llamahome.kernels.products import add_product_, multiply, sum_products


class LoraWeights(NamedTuple):
    """A linear layer and its adapter: y = x @ weight.T + bias + scaling * dropout(x) @ a.T @ b.T.

    A frozen weight may be in 4 bits (QLoRA): `weight=nf4.from_bitsandbytes(module.weight)`. Every operation that takes
    a `LoraWeights` takes it so.
    """

    weight: Tensor | Nf4Weight  # [N, K]
    bias: Tensor | None = None  # [N]
    a: Tensor | None = None  # [r, K]; None without an adapter
    b: Tensor | None = None  # [N, r]
    scaling: float = 1.0
    dropout: float = 0.0  # probability; 0 outside of training

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


def dense(lora: LoraWeights, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in the dtype of the products; of one in 4 bits a new tensor, which nobody should keep."""
    return dequantize(lora.weight, dtype) if isinstance(lora.weight, Nf4Weight) else lora.weight.to(dtype)


def drops(lora: LoraWeights) -> bool:
    return lora.a is not None and lora.dropout > 0


def project(
    y: Tensor, loras: list[LoraWeights], residual: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Each projection of y [T, K], y @ [a, ...].T as one [T, R] (None without adapters), and dropout masks [T, K]."""
    adapted = [lora for lora in loras if lora.a is not None]
    masks: list[Tensor] = []
    xa = None
    if any(map(drops, adapted)):
        parts = []
        for lora in adapted:
            dropped = y
            if lora.dropout:
                dropped, mask = torch.native_dropout(y, lora.dropout, True)
                masks.append(mask)
            parts.append(multiply(dropped, lora.a.T))  # type: ignore[union-attr]
        xa = torch.cat(parts, -1)
    elif adapted:
        xa = multiply(y, _stacked(adapted).T)
    return outputs(y, xa, loras, residual), xa, masks


def outputs(y: Tensor, xa: Tensor | None, loras: list[LoraWeights], residual: Tensor | None = None) -> list[Tensor]:
    """Each projection of y, the A matrices' products given, plus `residual`.

    The rank-r part is made first and the large product added to it in that one's accumulator. The other way round it
    would be added to numbers that are rounded already: in 16 bits an update below half of their last digit is lost, and
    that is half of what an adapter's first steps change.
    """
    parts = iter(() if xa is None else torch.split(xa, [lora.rank for lora in loras if lora.a is not None], -1))
    return [_output(y, None if lora.a is None else next(parts), lora, residual) for lora in loras]


def _output(y: Tensor, part: Tensor | None, lora: LoraWeights, residual: Tensor | None) -> Tensor:
    weight = dense(lora, y.dtype)  # gone when the next projection's is made
    pairs = [(y, weight.T)]
    if part is not None and lora.b is not None:
        pairs.insert(0, (part * lora.scaling, lora.b.T))
    if lora.bias is None:
        out: Tensor = sum_products(pairs, residual)
        return out
    out = F.linear(y, weight, lora.bias) if len(pairs) == 1 else sum_products(pairs) + lora.bias
    return out if residual is None else residual + out


def project_backward(
    d_outs: list[Tensor], y: Tensor, xa: Tensor | None, loras: list[LoraWeights], masks: list[Tensor | None],
    needs: Sequence[bool], need_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """(d y or None, the gradients of all tensors of the group in `_flatten`'s order)."""
    d_xa = through_b(d_outs, loras)
    grads = weight_gradients(d_outs, d_xa, y, xa, loras, masks, needs)
    return input_gradient(d_outs, d_xa, loras, masks) if need_input else None, grads


def input_gradient(
    d_outs: list[Tensor], d_xa: Tensor | None, loras: list[LoraWeights], masks: list[Tensor | None]
) -> Tensor:
    """The gradient of y [T, K], the small part first as in `outputs`."""
    if any(mask is not None for mask in masks) or any(isinstance(lora.weight, Nf4Weight) for lora in loras):
        total: Tensor | None = None if d_xa is None else _through_a(d_xa, loras, masks)
        for d_out, lora in zip(d_outs, loras, strict=True):
            weight = dense(lora, d_out.dtype)
            total = multiply(d_out, weight) if total is None else add_product_(total, d_out, weight)
            del weight  # before the next one is made
        assert total is not None
        return total
    pairs = [(d_out, dense(lora, d_out.dtype)) for d_out, lora in zip(d_outs, loras, strict=True)]
    if d_xa is not None:
        pairs.insert(0, (d_xa, _stacked([lora for lora in loras if lora.a is not None])))
    gradient: Tensor = sum_products(pairs)
    return gradient


def _through_a(d_xa: Tensor, loras: list[LoraWeights], masks: list[Tensor | None]) -> Tensor:
    """The part of y's gradient that comes through the adapters."""
    if all(mask is None for mask in masks):
        whole: Tensor = multiply(d_xa, _stacked([lora for lora in loras if lora.a is not None]))
        return whole
    adapted = [(lora, mask) for lora, mask in zip(loras, masks, strict=True) if lora.a is not None]
    split = zip(torch.split(d_xa, [lora.rank for lora, _ in adapted], -1), adapted, strict=True)
    total: Tensor | None = None
    for part, (lora, mask) in split:
        assert lora.a is not None
        found = _undropped(multiply(part, lora.a), mask, lora.dropout)
        total = found if total is None else total + found
    assert total is not None
    return total


def weight_gradients(
    d_outs: list[Tensor], d_xa: Tensor | None, y: Tensor, xa: Tensor | None, loras: list[LoraWeights],
    masks: list[Tensor | None], needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of weight, bias, a and b of each projection; None where none is needed."""
    ranks = [lora.rank for lora in loras if lora.a is not None]
    d_as = iter(_a_gradients(d_xa, y, loras, masks) if any(needs[2::4]) else [None] * len(ranks))
    parts = iter(() if xa is None else torch.split(xa, ranks, -1))
    grads: list[Tensor | None] = []
    for i, (d_out, lora) in enumerate(zip(d_outs, loras, strict=True)):
        need_weight, need_bias, need_a, need_b = needs[4 * i : 4 * i + 4]
        grads.append(multiply(d_out.T, y) if need_weight else None)
        grads.append(d_out.sum(0) if need_bias else None)
        d_a, part = (None, None) if lora.a is None else (next(d_as), next(parts))
        grads.append(d_a if need_a else None)
        grads.append(multiply(d_out.T, part) * lora.scaling if need_b and part is not None else None)
    return grads


def _a_gradients(
    d_xa: Tensor | None, y: Tensor, loras: list[LoraWeights], masks: list[Tensor | None]
) -> Sequence[Tensor | None]:
    """d a of each adapter: one product over the shared input, or one each where their dropout differs."""
    if d_xa is None:
        return []
    adapted = [(lora, mask) for lora, mask in zip(loras, masks, strict=True) if lora.a is not None]
    ranks = [lora.rank for lora, _ in adapted]
    if all(mask is None for mask in masks):
        return torch.split(multiply(d_xa.T, y), ranks)
    split = zip(torch.split(d_xa, ranks, -1), adapted, strict=True)
    return [multiply(part.T, _undropped(y, mask, lora.dropout)) for part, (lora, mask) in split]


def through_b(d_outs: list[Tensor], loras: list[LoraWeights]) -> Tensor | None:
    """The gradient of x @ [a, ...].T, [T, R]; None without adapters."""
    pairs = zip(d_outs, loras, strict=True)
    parts = [multiply(d_out, lora.b) * lora.scaling for d_out, lora in pairs if lora.b is not None]
    return torch.cat(parts, -1) if parts else None


def _undropped(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    return x if mask is None else x * mask * (1 / (1 - probability))


def _stacked(adapted: list[LoraWeights]) -> Tensor:
    """[a, ...] of one group, [R, K]."""
    matrices = [lora.a for lora in adapted if lora.a is not None]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)
