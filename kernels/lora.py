"""Linear layers with LoRA adapters (arXiv 2106.09685) whose backward keeps little, by autograd functions of their own.

Projections over one input form a group: the input is normalised once, multiplied once by the group's A matrices laid
one upon the other (rank R in all), and kept once. The norm's output, and the MLP's product, are made again in backward
where they are read. No weight is ever merged. A frozen weight in 4 bits (`nf4.Nf4Weight`) is made dense where a
product reads it, in forward and again in backward, one projection at a time.

Saved per token and Llama layer in bf16, all projections adapted: 8h + 4f + 4kv + 4hq + 14r + 8 bytes (h hidden, f MLP
width, kv key-value width, hq query heads, r rank).

Shapes: T tokens, K inputs, N outputs, r rank. Products run in autocast's dtype where it is on, else in that of x; each
gradient comes in the dtype of its tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llamahome.kernels.launch import use_triton
from llamahome.kernels.lora_products import (
    LoraWeights,
    drops,
    input_gradient,
    outputs,
    project,
    project_backward,
    through_b,
    weight_gradients,
)
from llamahome.kernels.mlp import Activation, GatedLora, gated_backward, gated_forward
from llamahome.kernels.nf4 import NestedAbsmax, Nf4Weight, dequantize_reference
from llamahome.kernels.norm import rms_norm_apply, rms_norm_backward, rms_norm_forward, rms_norm_reference


class NormWeights(NamedTuple):
    """The RMS norm before a group: weight [K], its eps, and the offset 1 that Gemma adds to the weight."""

    weight: Tensor
    eps: float
    offset: float = 0.0


def lora_linear_reference(x: Tensor, lora: LoraWeights) -> Tensor:
    """The plain definition, differentiable; the same result as `lora_linear`, dropout drawn in the same order."""
    weight = dequantize_reference(lora.weight, x.dtype) if isinstance(lora.weight, Nf4Weight) else lora.weight
    y: Tensor = F.linear(x, weight, lora.bias)
    if lora.a is not None and lora.b is not None:
        y = y + F.linear(F.linear(F.dropout(x, lora.dropout), lora.a), lora.b) * lora.scaling
    return y


def norm_lora_linears_reference(x: Tensor, norm: NormWeights | None, loras: Sequence[LoraWeights]) -> list[Tensor]:
    """The plain definition, differentiable; the same results as `norm_lora_linears`."""
    y = x if norm is None else rms_norm_reference(x, *norm)
    return [lora_linear_reference(y, lora) for lora in loras]


def lora_mlp_reference(
    x: Tensor, norm: NormWeights | None, gates: Sequence[LoraWeights], down: LoraWeights,
    activation: Activation = "silu", *, residual: bool = False,
) -> Tensor:  # fmt: skip
    """The plain definition, differentiable; the same result as `lora_mlp`."""
    e, g = _halves(norm_lora_linears_reference(x, norm, gates))
    y = lora_linear_reference(gated_forward(e, g, activation), down)
    return x + y if residual else y


def lora_linear(x: Tensor, lora: LoraWeights, residual: Tensor | None = None) -> Tensor:
    """x [T, K] -> [T, N], plus `residual` [T, N] where given. Saves x and x @ a.T. Differentiable once.

    On a GPU, up to 256 rows without a gradient (a model that answers) are one kernel.
    """
    options, tensors = _flatten([lora], x)
    if lora.a is not None and lora.b is not None and _is_small(x, lora):
        from llamahome.kernels.lora_triton import lora_linear as small

        y: Tensor = small(x.to(options.dtype), lora.weight, lora.bias, lora.a, lora.b, lora.scaling)[0]
        return y if residual is None else residual + y
    return _linear(x, residual, options, tensors)


def _is_small(x: Tensor, lora: LoraWeights) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not use_triton(x) or lora.dropout:
        return False
    from llamahome.kernels.lora_triton import fits

    few: bool = fits(x)
    return few


def norm_lora_linears(x: Tensor, norm: NormWeights | None, loras: Sequence[LoraWeights]) -> tuple[Tensor, ...]:
    """Several projections of one normalised input, x [T, K] -> one [T, N] each; `norm` None leaves the norm out.

    Saves x, the norm's 1 / rms per row, and x @ [a, ...].T. Differentiable once.
    """
    weight, eps, offset = norm or (None, 0.0, 0.0)
    return _norm_linears(x, weight, eps, offset, *_flatten(loras, x))


def lora_mlp(
    x: Tensor, norm: NormWeights | None, gates: Sequence[LoraWeights], down: LoraWeights,
    activation: Activation = "silu", *, residual: bool = False, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """The gated MLP of a decoder layer with its norm, x [T, h] -> [T, h]: down(activation(gate(norm x)) * up(norm x)).

    Args:
        gates: gate and up, or one projection [2f, h] that holds both, gate first (Phi-3).
        residual: add x to the result.
        recompute: make gate and up again in backward instead of keeping them: 4f bytes less per token in bf16 for
            their two products.

    Saves x, the norm's 1 / rms per row, gate's and up's outputs, and what each adapter's A made. Differentiable once.
    """
    weight, eps, offset = norm or (None, 0.0, 0.0)
    flags = (eps, offset, activation, residual, recompute)
    return _mlp(x, weight, flags, *_flatten([*gates, down], x))


class _Options(NamedTuple):
    """What is no tensor of a group."""

    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    dtype: torch.dtype  # of the products
    packs: tuple[_Pack | None, ...]  # of weights in 4 bits

    @property
    def projections(self) -> int:
        return len(self.scalings)

    @property
    def no_gradients(self) -> list[None]:
        """One for each tensor of a pack that is none of a projection's four."""
        return [None] * sum(pack.others for pack in self.packs if pack)


class _Pack(NamedTuple):
    """What is no tensor of a weight in 4 bits, and how many tensors it has besides `packed`."""

    shape: tuple[int, int]
    dtype: torch.dtype
    block: int
    others: int


_Tensors = tuple[Tensor | None, ...]  # weight or packed, bias, a, b of each projection; then the packs' other tensors


def _linear(x: Tensor, residual: Tensor | None, options: _Options, tensors: _Tensors) -> Tensor:
    y: Tensor = _Linear.apply(x, residual, options, *tensors)  # type: ignore[no-untyped-call]
    return y


def _norm_linears(
    x: Tensor, norm: Tensor | None, eps: float, offset: float, options: _Options, tensors: _Tensors
) -> tuple[Tensor, ...]:
    outs: tuple[Tensor, ...] = _NormLinears.apply(x, norm, eps, offset, options, *tensors)  # type: ignore[no-untyped-call]
    return outs


def _mlp(x: Tensor, norm: Tensor | None, flags: Any, options: _Options, tensors: _Tensors) -> Tensor:
    y: Tensor = _Mlp.apply(x, norm, flags, options, *tensors)  # type: ignore[no-untyped-call]
    return y


# For torch.compiler.allow_in_graph: dynamo's own tracing of autograd functions fails on them (torch 2.13), while
# AOTAutograd, which then traces them by running them, sees forward and backward as they are.
TRACED_BY_RUNNING = (_linear, _norm_linears, _mlp)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, residual: Tensor | None, options: _Options, *tensors: Tensor | None,  # noqa: ANN001
    ) -> Tensor:  # fmt: skip
        loras = _unflatten(tensors, options)
        out: Tensor
        (out,), xa, masks = project(x.to(options.dtype), loras, residual)
        ctx.save_for_backward(x, xa, *tensors, *masks)
        ctx.options, ctx.residual_dtype = options, None if residual is None else residual.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        (x, xa), loras, masks = _saved(ctx, 2)
        y, d_low = x.to(ctx.options.dtype), d_out.to(ctx.options.dtype)
        d_x, grads = project_backward([d_low], y, xa, loras, masks, ctx.needs_input_grad[3:], ctx.needs_input_grad[0])
        d_residual = d_out.to(ctx.residual_dtype) if ctx.needs_input_grad[1] else None
        return None if d_x is None else d_x.to(x.dtype), d_residual, None, *grads, *ctx.options.no_gradients


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, norm: Tensor | None, eps: float, offset: float, options: _Options, *tensors: Tensor | None,  # noqa: ANN001
    ) -> tuple[Tensor, ...]:  # fmt: skip
        loras = _unflatten(tensors, options)
        y, rstd = _normalised(x, norm, eps, offset)
        outs, xa, masks = project(y.to(options.dtype), loras)
        ctx.save_for_backward(x, norm, rstd, xa, *tensors, *masks)
        ctx.options, ctx.offset = options, offset
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outs: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        (x, norm, rstd, xa), loras, masks = _saved(ctx, 4)
        need_x, need_norm = ctx.needs_input_grad[:2]
        y = x if norm is None else rms_norm_apply(x, norm, rstd, ctx.offset)
        d_low = [d_out.to(ctx.options.dtype) for d_out in d_outs]
        d_y, grads = project_backward(
            d_low, y.to(ctx.options.dtype), xa, loras, masks, ctx.needs_input_grad[5:], need_x or need_norm
        )
        d_x, d_norm = _norm_backward(d_y, x, norm, rstd, ctx.offset, need_norm, None)
        return d_x, d_norm, None, None, None, *grads, *ctx.options.no_gradients


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, norm: Tensor | None, flags: Any, options: _Options, *tensors: Tensor | None,  # noqa: ANN001
    ) -> Tensor:  # fmt: skip
        eps, offset, activation, residual, recompute = flags
        *gates, down = _unflatten(tensors, options)
        y, rstd = _normalised(x, norm, eps, offset)
        bare = _bare(x, gates)
        outs, xa, masks = project(y.to(options.dtype), bare)
        h = gated_forward(*_halves(outs), activation, _update(bare, gates, xa))
        out: Tensor
        (out,), xa_down, mask_down = project(h, [down], x if residual else None)
        ctx.count = 0 if recompute else len(outs)
        ctx.save_for_backward(x, norm, rstd, xa, xa_down, *outs[: ctx.count], *tensors, *masks, *mask_down)
        ctx.options, ctx.flags = options, flags
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        (x, norm, rstd, xa, xa_down, *outs), loras, masks = _saved(ctx, 5 + ctx.count)
        _, offset, activation, residual, _ = ctx.flags
        need_x, need_norm = ctx.needs_input_grad[:2]
        needs, dtype = ctx.needs_input_grad[4:], ctx.options.dtype
        *gates, down = loras
        y = (x if norm is None else rms_norm_apply(x, norm, rstd, offset)).to(dtype)
        bare = _bare(x, gates)
        e, g = _halves(outs or outputs(y, xa, bare))
        d_low = d_out.to(dtype)
        d_xa = through_b([d_low], [down])
        d_h = input_gradient([d_low], d_xa, [down], masks[-1:])
        h, d_e, d_g = gated_backward(d_h, e, g, activation, _update(bare, gates, xa))
        split = 4 * len(gates)
        grads_down = weight_gradients([d_low], d_xa, h, xa_down, [down], masks[-1:], needs[split:])
        del d_h, h, e, g, outs
        d_outs = [d_e, d_g] if len(gates) == 2 else [torch.cat((d_e, d_g), -1)]
        del d_e, d_g
        d_y, grads = project_backward(d_outs, y, xa, gates, masks[:-1], needs[:split], need_x or need_norm)
        d_x, d_norm = _norm_backward(d_y, x, norm, rstd, offset, need_norm, d_out if residual else None)
        return d_x, d_norm, None, None, *grads, *grads_down, *ctx.options.no_gradients


def _flatten(loras: Sequence[LoraWeights], x: Tensor) -> tuple[_Options, _Tensors]:
    """The tensors of a group in a row, as autograd wants them, and the rest."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    tensors: list[Tensor | None] = []
    others: list[Tensor] = []
    packs: list[_Pack | None] = []
    for weight, bias, a, b, _, _ in loras:
        if isinstance(weight, Nf4Weight):
            more = [weight.code, *((weight.absmax,) if isinstance(weight.absmax, Tensor) else weight.absmax)]
            packs.append(_Pack(weight.shape, weight.dtype, weight.block, len(more)))
            others += more
            tensors += [weight.packed, bias, a, b]
        else:
            packs.append(None)
            tensors += [weight, bias, a, b]
    scalings, dropouts = tuple(lora.scaling for lora in loras), tuple(lora.dropout for lora in loras)
    return _Options(scalings, dropouts, dtype, tuple(packs)), (*tensors, *others)


def _unflatten(tensors: Sequence[Tensor | None], options: _Options) -> list[LoraWeights]:
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


def _packed(packed: Tensor, others: Iterator[Any], pack: _Pack) -> Nf4Weight:
    code, *absmax = itertools.islice(others, pack.others)
    return Nf4Weight(
        packed, absmax[0] if len(absmax) == 1 else NestedAbsmax(*absmax), pack.shape, pack.dtype, code, pack.block
    )


def _saved(ctx: Any, count: int) -> tuple[tuple[Tensor, ...], list[LoraWeights], list[Tensor | None]]:
    """The first `count` saved tensors, the group, and a dropout mask or None for each of its projections."""
    tensors = ctx.saved_tensors
    end = count + 4 * ctx.options.projections + len(ctx.options.no_gradients)
    loras = _unflatten(tensors[count:end], ctx.options)
    drawn = iter(tensors[end:])
    return tensors[:count], loras, [next(drawn) if drops(lora) else None for lora in loras]


def _bare(x: Tensor, gates: list[LoraWeights]) -> list[LoraWeights]:
    """gate and up without their B where the Triton kernel that reads their products adds the rank-r parts itself."""
    absorbs = use_triton(x) and len(gates) == 2 and gates[0].rank == gates[1].rank > 0
    return [lora._replace(b=None) for lora in gates] if absorbs else gates


def _update(bare: list[LoraWeights], gates: list[LoraWeights], xa: Tensor | None) -> GatedLora | None:
    """The rank-r parts that `bare` lacks."""
    gate, up = gates[0], gates[-1]
    if bare is gates or xa is None or gate.b is None or up.b is None:
        return None
    xa_gate, xa_up = xa.chunk(2, -1)
    return GatedLora(xa_gate, gate.b, xa_up, up.b, gate.scaling, up.scaling)


def _halves(outs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """gate's and up's outputs, of two projections or of one that holds both."""
    first, second = outs if len(outs) == 2 else outs[0].chunk(2, -1)
    return first, second


def _normalised(x: Tensor, norm: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor | None]:
    if norm is None:
        return x, None
    y, rstd, _ = rms_norm_forward(x, norm, eps, offset)
    return y, rstd


def _norm_backward(
    d_y: Tensor | None, x: Tensor, norm: Tensor | None, rstd: Tensor, offset: float, need_weight: bool,
    d_residual: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    if d_y is None:
        return None, None
    if norm is None:
        d_x = d_y.to(x.dtype)
        return (d_x if d_residual is None else d_x + d_residual), None
    grads: tuple[Tensor, Tensor | None] = rms_norm_backward(d_y, x, norm, rstd, offset, need_weight, d_residual)
    return grads
