"""The gated unit of an MLP: activation(e) * g, with SwiGLU's and GeGLU's activations (arXiv 2002.05202).

Saved for backward: e and g. The product is made again in the backward pass, where the down projection's adapter
needs it. A LoRA update of the gate and up projections may be absorbed: e and g are then the frozen products alone,
and the rank-r part is added while they are read.

On a GPU the Triton kernels of `mlp_triton.py` run, under `torch.compile` as custom ops; on a CPU there is plain
PyTorch only, which the compiler fuses with its surroundings.

Shapes: e, g, h [..., f]; xa_gate, xa_up [..., r]; b_gate, b_up [f, r].
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llamahome.kernels.launch import use_triton

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
    if _as_op(e):
        h: Tensor = _forward_op(e, g, activation)
    else:
        h = _Gated.apply(e, g, activation)  # type: ignore[no-untyped-call]
    return h


def gated_forward(e: Tensor, g: Tensor, activation: Activation = "silu", lora: GatedLora | None = None) -> Tensor:
    """h = activation(e) * g without autograd, after adding the rank-r parts of `lora` to e and g."""
    if _as_op(e):
        h: Tensor = _forward_op(e, g, activation) if lora is None else _lora_forward_op(e, g, activation, *lora)
        return h
    if _runs_triton(e):
        from llamahome.kernels.mlp_triton import forward

        result: Tensor = forward(e, g, activation, lora)
        return result
    e, g = _add_lora(e, g, lora)
    return _activate(e, activation) * g


def gated_backward(
    dh: Tensor, e: Tensor, g: Tensor, activation: Activation = "silu", lora: GatedLora | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, de, dg) without autograd, into new tensors. de and dg are also the gradients of the rank-r parts."""
    if _as_op(e):
        h, de, dg = _backward_op(dh, e, g, activation, *(lora or (None, None, None, None, 0.0, 0.0)))
        return h, de, dg
    if _runs_triton(e):
        from llamahome.kernels.mlp_triton import backward

        results: tuple[Tensor, Tensor, Tensor] = backward(dh, e, g, activation, lora)
        return results
    e, g = _add_lora(e, g, lora)
    active = _activate(e, activation)
    return active * g, _activate_backward(dh * g, e, activation), dh * active


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, g: Tensor, activation: Activation) -> Tensor:
        _keep(ctx, (e, g, activation), None)
        return gated_forward(e, g, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dh)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    e, g, ctx.activation = inputs
    ctx.save_for_backward(e, g)


def _gradients(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    e, g = ctx.saved_tensors
    _, de, dg = gated_backward(dh, e, g, ctx.activation)
    return de, dg, None


@torch.library.custom_op("llamahome::gated", mutates_args=())
def _forward_op(e: Tensor, g: Tensor, activation: str) -> Tensor:
    return gated_forward(e, g, cast(Activation, activation))


@_forward_op.register_fake
def _(e: Tensor, g: Tensor, activation: str) -> Tensor:
    return e.new_empty(e.shape)


_forward_op.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("llamahome::gated_lora", mutates_args=())
def _lora_forward_op(
    e: Tensor, g: Tensor, activation: str, xa_gate: Tensor, b_gate: Tensor, xa_up: Tensor, b_up: Tensor,
    scaling_gate: float, scaling_up: float,
) -> Tensor:  # fmt: skip
    """Without autograd: whoever absorbs an adapter knows its whole backward pass."""
    lora = GatedLora(xa_gate, b_gate, xa_up, b_up, scaling_gate, scaling_up)
    return gated_forward(e, g, cast(Activation, activation), lora)


@_lora_forward_op.register_fake
def _(
    e: Tensor, g: Tensor, activation: str, xa_gate: Tensor, b_gate: Tensor, xa_up: Tensor, b_up: Tensor,
    scaling_gate: float, scaling_up: float,
) -> Tensor:  # fmt: skip
    return e.new_empty(e.shape)


@torch.library.custom_op("llamahome::gated_backward", mutates_args=())
def _backward_op(
    dh: Tensor, e: Tensor, g: Tensor, activation: str, xa_gate: Tensor | None, b_gate: Tensor | None,
    xa_up: Tensor | None, b_up: Tensor | None, scaling_gate: float, scaling_up: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lora = None
    if xa_gate is not None and b_gate is not None and xa_up is not None and b_up is not None:
        lora = GatedLora(xa_gate, b_gate, xa_up, b_up, scaling_gate, scaling_up)
    return gated_backward(dh, e, g, cast(Activation, activation), lora)


@_backward_op.register_fake
def _(
    dh: Tensor, e: Tensor, g: Tensor, activation: str, xa_gate: Tensor | None, b_gate: Tensor | None,
    xa_up: Tensor | None, b_up: Tensor | None, scaling_gate: float, scaling_up: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return e.new_empty(e.shape), e.new_empty(e.shape), g.new_empty(g.shape)


def _as_op(x: Tensor) -> bool:
    """A compiler sees custom ops where Triton kernels run, and plain PyTorch elsewhere."""
    return torch.compiler.is_compiling() and _runs_triton(x)


def _runs_triton(x: Tensor) -> bool:
    return use_triton(x) and x.dtype != torch.float64


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
