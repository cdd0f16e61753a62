"""What a LoRA layer leaves to the kernels that read its products: the rank-r parts of some of its projections."""

from __future__ import annotations

import torch
from torch import Tensor

from llamahome.kernels.lora_products import LoraWeights
from llamahome.kernels.low_rank import LowRank, absorbs
from llamahome.kernels.mlp import GatedLora


def bare_projection(x: Tensor, lora: LoraWeights) -> LoraWeights:
    """The projection without its B where the Triton kernel that reads its product adds the rank-r part itself."""
    return lora._replace(b=None) if lora.b is not None and absorbs(x) else lora


def low_ranks(xa: Tensor | None, bare: list[LoraWeights], loras: list[LoraWeights]) -> list[LowRank | None]:
    """The rank-r part that each projection of `bare` lacks."""
    parts = iter(() if xa is None else torch.split(xa, [lora.rank for lora in loras if lora.a is not None], -1))
    updates: list[LowRank | None] = []
    for lacking, lora in zip(bare, loras, strict=True):
        part = None if lora.a is None else next(parts)
        absent = part is not None and lora.b is not None and lacking.b is None
        updates.append(LowRank(part, lora.b, lora.scaling) if absent else None)
    return updates


def bare_gates(x: Tensor, gates: list[LoraWeights]) -> list[LoraWeights]:
    """gate and up without their B where the Triton kernel that reads their products adds the rank-r parts itself."""
    same = len(gates) == 2 and gates[0].rank == gates[1].rank > 0
    return [lora._replace(b=None) for lora in gates] if same and absorbs(x) else gates


def gated_update(bare: list[LoraWeights], gates: list[LoraWeights], xa: Tensor | None) -> GatedLora | None:
    """The rank-r parts that `bare` lacks."""
    gate, up = gates[0], gates[-1]
    if bare is gates or xa is None or gate.b is None or up.b is None:
        return None
    xa_gate, xa_up = xa.chunk(2, -1)
    return GatedLora(xa_gate, gate.b, xa_up, up.b, gate.scaling, up.scaling)
