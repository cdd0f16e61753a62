"""What computing parts of a decoder layer again in backward saves, and what it costs in arithmetic.

The first layers are the ones to compute again: backward reaches them last, when those behind have given back what they
kept. So a layer that is made again there stands in freed memory, and only where all layers are does it add to the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamahome.memory.layers import AdapterSettings, kept_per_token
from llamahome.memory.shape import ModelShape


@dataclass(frozen=True)
class Part:
    """Of one layer and token: bytes that are not kept, and operations (2 per multiply and add) that are made again.

    Adapters and attention's own products are left out of the operations, as in `flops`.
    """

    saved_bytes: int
    flops: int

    @property
    def bytes_per_kiloflop(self) -> float:
        return 1000 * self.saved_bytes / self.flops


def entry_per_token(shape: ModelShape, *, low: bool, wide: bool) -> int:
    """Bytes of a layer's input, all that it keeps where it is computed again. `wide`: fp32 in any case."""
    return shape.hidden * (2 if low and not wide else 4)


def mlp_per_token(shape: ModelShape, *, low: bool) -> int:
    """Bytes of the MLP's gate and up products."""
    return 2 * (2 if low else 4) * shape.mlp


def parts(
    shape: ModelShape, adapter: AdapterSettings | None, *, low: bool, trains_base: bool, fused: bool
) -> dict[str, Part]:
    """`mlp`: gate and up products (fused layers only), `rest`: all else of the layer, `layer`: both.

    `rest` is what going on from the MLP to the layer costs and saves.
    """
    kept = kept_per_token(shape, adapter, low=low, trains_base=trains_base, fused=fused)
    saved = kept - entry_per_token(shape, low=low, wide=trains_base)
    layer = Part(saved, 2 * sum(n * m for n, m in shape.projections.values()))
    if not fused:
        return {"layer": layer}
    mlp = Part(mlp_per_token(shape, low=low), 4 * shape.hidden * shape.mlp)
    rest = Part(layer.saved_bytes - mlp.saved_bytes, layer.flops - mlp.flops)
    return {"mlp": mlp, "rest": rest, "layer": layer}


def in_order_of_cost(shape: ModelShape, *, fused: bool) -> list[int | str]:
    """Values of `processing.gradient_checkpointing` by the arithmetic that they add: so many layers, or "mlp"."""
    linear = sum(n * m for n, m in shape.projections.values())
    choices: list[tuple[float, int | str]] = [(number, number) for number in range(1, shape.layers)]
    if fused:
        choices.append((shape.layers * 2 * shape.hidden * shape.mlp / linear, "mlp"))
    return [value for _, value in sorted(choices, key=lambda choice: choice[0])]
