"""Bytes per token that one decoder layer keeps for backward, and what backward needs on top.

Method: the tensors that autograd keeps were counted for layers of nine to eleven shapes (PyTorch 2.13, transformers
5.23, PEFT 0.21, attention that saves q, k, v, output and log-sum-exp); the coefficients of each size were solved for
and come out whole and exact. Symbols: h hidden, f MLP width, a heads x head size, kv key-value heads x head size, hq
heads, r rank. "Low" is a compute type of 2 bytes over frozen weights of that type; else 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llamahome.memory.shape import ModelShape


class AdapterSettings(Protocol):
    """What of the section `lora` of the configuration counts here."""

    @property
    def rank(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def target_modules(self) -> str | Sequence[str]: ...


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings without a configuration."""

    rank: int = 16
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"


def kept_per_token(
    shape: ModelShape, adapter: AdapterSettings | None, *, low: bool, trains_base: bool, fused: bool,
    shared: bool = False,
) -> int:  # fmt: skip
    """Bytes that one layer keeps per token; `adapter` is not looked at where the base itself is trained.

    shared: by FSDP2, which gathers trained weights in the compute type, so that fused layers' inputs have it too.
    """
    if fused:
        return _fused(shape, None if trains_base else adapter, low, trains_base and not shared)
    if trains_base or adapter is None:
        return _full(shape, low)
    return _lora(shape, adapter, low)


def backward_per_token(shape: ModelShape, *, low: bool, trains_base: bool, fused: bool) -> int:
    """Temporaries of backward per token, on top of what was kept: at the MLP's product or at a norm."""
    h, f = shape.hidden, shape.mlp
    if fused:
        return (8 * f + 6 * h) if low else (16 * f + 12 * h)
    if trains_base:
        return max(20 * h, 4 * f if low else 8 * f)
    return max(6 * h + 6 * f, 22 * h) if low else max(4 * h + 8 * f, 24 * h)


def _fused(shape: ModelShape, adapter: AdapterSettings | None, low: bool, wide: bool) -> int:
    """Layers of `llamahome.model.fuse`: both norms' inputs, q k v and output, gate and up, and what each A made.

    All linear layers adapted, a = h, bf16: 8h + 4f + 4kv + 4hq + 14r + 8. Dropout keeps a mask of one byte.
    `wide`: what goes from layer to layer is fp32, as it comes from an embedding that is trained.
    """
    element, stream = (2 if low else 4), (2 if low and not wide else 4)
    widths = shape.hidden * 2 * stream + 2 * element * (shape.mlp + shape.attention + shape.key_value)
    inputs = [shape.projections[name][0] for name in shape.targets(adapter.target_modules)] if adapter else []
    ranks = element * len(inputs) * adapter.rank if adapter else 0
    masks = sum(inputs) if adapter and adapter.dropout else 0
    return widths + ranks + masks + 4 * shape.heads + 8


def _lora(shape: ModelShape, adapter: AdapterSettings, low: bool) -> int:
    """Adapters in fp32 on frozen weights, in transformers' and PEFT's own layers.

    All linear layers adapted: 18h + 8f + 6a + 4kv + 14r + 4hq + 8 in bf16, 16h + 16f + 8a + 8kv + 28r + 4hq + 8 in
    fp32. In bf16 each adapter keeps its own copy of its input, in fp32 those with one input share it; dropout keeps
    a mask of 4 bytes and, in fp32, an input of its own.
    """
    h, f, a, kv = shape.hidden, shape.mlp, shape.attention, shape.key_value
    targets = shape.targets(adapter.target_modules)
    inputs = {name: shape.projections[name][0] for name in targets}
    ranks = len(targets) * adapter.rank
    if low:
        kept = 8 * h + 6 * f + 4 * a + 4 * kv + 2 * ranks + 2 * sum(inputs.values())
    else:
        groups = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
        shared = 4 * h * sum(not group.isdisjoint(inputs) for group in groups)
        own = 4 * sum(inputs.values()) if adapter.dropout else shared + 4 * inputs.get("down_proj", 0)
        kept = 8 * h + 12 * f + 8 * a + 8 * kv + 4 * ranks + own
    return kept + (4 * sum(inputs.values()) if adapter.dropout else 0) + 4 * shape.heads + 8


def _full(shape: ModelShape, low: bool) -> int:
    """Weights trained in fp32, in transformers' own layers."""
    h, f, a, kv = shape.hidden, shape.mlp, shape.attention, shape.key_value
    rates = 26 * h + 8 * f + 4 * a + 4 * kv if low else 24 * h + 16 * f + 8 * a + 8 * kv
    return rates + 4 * shape.heads + 8
