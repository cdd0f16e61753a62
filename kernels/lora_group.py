"""A group of LoRA projections as autograd wants it: tensors in a row, and the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamahome.kernels.lora_products import LoraWeights
from llamahome.kernels.nf4 import NestedAbsmax, Nf4Weight

Tensors = tuple[Tensor | None, ...]  # weight or packed, bias, a, b of each projection; then the packs' other tensors


class Options(NamedTuple):
    """What is no tensor of a group."""

    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    dtype: torch.dtype  # of the products
    packs: tuple[Pack | None, ...]  # of weights in 4 bits

    @property
    def projections(self) -> int:
        return len(self.scalings)

    @property
    def no_gradients(self) -> list[None]:
        """One for each tensor of a pack that is none of a projection's four."""
        return [None] * sum(pack.others for pack in self.packs if pack)


class Pack(NamedTuple):
    """What is no tensor of a weight in 4 bits, and how many tensors it has besides `packed`."""

    shape: tuple[int, int]
    dtype: torch.dtype
    block: int
    others: int


def flatten(loras: Sequence[LoraWeights], x: Tensor) -> tuple[Options, Tensors]:
    """The tensors of a group in a row, as autograd wants them, and the rest."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    tensors: list[Tensor | None] = []
    others: list[Tensor] = []
    packs: list[Pack | None] = []
    for weight, bias, a, b, _, _ in loras:
        if isinstance(weight, Nf4Weight):
            more = [weight.code, *((weight.absmax,) if isinstance(weight.absmax, Tensor) else weight.absmax)]
            packs.append(Pack(weight.shape, weight.dtype, weight.block, len(more)))
            others += more
            tensors += [weight.packed, bias, a, b]
        else:
            packs.append(None)
            tensors += [weight, bias, a, b]
    scalings, dropouts = tuple(lora.scaling for lora in loras), tuple(lora.dropout for lora in loras)
    return Options(scalings, dropouts, dtype, tuple(packs)), (*tensors, *others)


def unflatten(tensors: Sequence[Tensor | None], options: Options) -> list[LoraWeights]:
    """The group again, its tensors in the dtype of the products, but weights in 4 bits as they are."""
    others = iter(tensors[4 * options.projections :])
    loras = []
    for i, pack in enumerate(options.packs):
        weight, *rest = tensors[4 * i : 4 * i + 4]
        low: list[Any] = [None if tensor is None else tensor.to(options.dtype) for tensor in rest]
        assert weight is not None
        whole = weight.to(options.dtype) if pack is None else _packed(weight, others, pack)
        loras.append(LoraWeights(whole, *low, options.scalings[i], options.dropouts[i]))
    return loras


def _packed(packed: Tensor, others: Iterator[Any], pack: Pack) -> Nf4Weight:
    code, *absmax = itertools.islice(others, pack.others)
    return Nf4Weight(
        packed, absmax[0] if len(absmax) == 1 else NestedAbsmax(*absmax), pack.shape, pack.dtype, code, pack.block
    )
