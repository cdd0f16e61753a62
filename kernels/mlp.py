"""The gated unit of an MLP: activation(e) * g, with SwiGLU's and GeGLU's activations (arXiv 2002.05202).

Saved for backward: e and g. The product is made again in the backward pass, where the down projection's adapter
needs it. A LoRA update of the gate and up projections may be absorbed: e and g are then the frozen products alone,
and the rank-r part is added while they are read.

Shapes: e, g, h [..., f]; xa_gate, xa_up [..., r]; b_gate, b_up [f, r].
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Literal["silu", "gelu_tanh"]


class GatedLora(NamedTuple):
    """The rank-r part of gate and up: e += scaling_gate * xa_gate @ b_gate.T, and so for g."""

    xa_gate: Tensor
    b_gate: Tensor
    xa_up: Tensor
    b_up: Tensor
    scaling_gate: float
    scaling_up: float


def gated_reference(e: Tensor, g: Tensor, activation: Activation = "silu") -> Tensor:
    """The plain definition, differentiable; same arguments and result as `gated`."""
    return _activate(e, activation) * g


def gated(e: Tensor, g: Tensor, activation: Activation = "silu") -> Tensor:
    """activation(e) * g; differentiable once.

    Raises: ValueError for another activation than "silu" and "gelu_tanh".
    """
    h: Tensor = _Gated.apply(e, g, activation)  # type: ignore[no-untyped-call]
    return h


def gated_forward(e: Tensor, g: Tensor, activation: Activation = "silu", lora: GatedLora | None = None) -> Tensor:
    """h = activation(e) * g without autograd, after adding the rank-r parts of `lora` to e and g."""
    e, g = _add_lora(e, g, lora)
    return _activate(e, activation) * g


def gated_backward(
    dh: Tensor, e: Tensor, g: Tensor, activation: Activation = "silu", lora: GatedLora | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, de, dg) without autograd, into new tensors. de and dg are also the gradients of the rank-r parts."""
    e, g = _add_lora(e, g, lora)
    active = _activate(e, activation)
    return active * g, _activate_backward(dh * g, e, activation), dh * active


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, e: Tensor, g: Tensor, activation: Activation) -> Tensor:  # type: ignore[no-untyped-def] # noqa: ANN001
        ctx.save_for_backward(e, g)
        ctx.activation = activation
        return gated_forward(e, g, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        e, g = ctx.saved_tensors
        _, de, dg = gated_backward(dh, e, g, ctx.activation)
        return de, dg, None


def _activate(e: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(e)
    if activation == "gelu_tanh":
        return F.gelu(e, approximate="tanh")
    raise ValueError(f"activation must be 'silu' or 'gelu_tanh', not {activation!r}")


def _activate_backward(grad: Tensor, e: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        de: Tensor = torch.ops.aten.silu_backward(grad, e)
    else:
        de = torch.ops.aten.gelu_backward(grad, e, approximate="tanh")
    return de


def _add_lora(e: Tensor, g: Tensor, lora: GatedLora | None) -> tuple[Tensor, Tensor]:
    if lora is None:
        return e, g
    xa_gate, b_gate, xa_up, b_up, scaling_gate, scaling_up = lora
    return e + xa_gate @ b_gate.T * scaling_gate, g + xa_up @ b_up.T * scaling_up
