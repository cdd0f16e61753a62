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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llamahome.kernels.launch import use_triton
from llamahome.kernels.lora_absorb import bare_gates, bare_projection, gated_update, low_ranks
from llamahome.kernels.lora_group import Options, Tensors, flatten, unflatten
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
from llamahome.kernels.low_rank import LowRank
from llamahome.kernels.mlp import Activation, gated_backward, gated_forward, gated_reference
from llamahome.kernels.nf4 import Nf4Weight, dequantize_reference
from llamahome.kernels.norm import rms_norm_apply, rms_norm_backward, rms_norm_forward, rms_norm_reference
from llamahome.kernels.rope import rope_apply, rotate_reference


class Angles(NamedTuple):
    """What turns queries and keys: cos and sin [T, R] as `rope.py` describes them, and the size of a head."""

    cos: Tensor
    sin: Tensor
    head_size: int


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


def norm_lora_linears_reference(
    x: Tensor, norm: NormWeights | None, loras: Sequence[LoraWeights], angles: Angles | None = None
) -> list[Tensor]:
    """The plain definition, differentiable; the same results as `norm_lora_linears`."""
    y = x if norm is None else rms_norm_reference(x, *norm)
    outs = [lora_linear_reference(y, lora) for lora in loras]
    if angles is not None:
        heads = [out.view(len(x), -1, angles.head_size) for out in outs[:2]]
        outs[:2] = [turned.flatten(1) for turned in rotate_reference(*heads, angles.cos, angles.sin)]
    return outs


def lora_mlp_reference(
    x: Tensor, norm: NormWeights | None, gates: Sequence[LoraWeights], down: LoraWeights,
    activation: Activation = "silu", *, residual: bool = False,
) -> Tensor:  # fmt: skip
    """The plain definition, differentiable; the same result as `lora_mlp`."""
    e, g = _halves(norm_lora_linears_reference(x, norm, gates))
    y = lora_linear_reference(gated_reference(e, g, activation), down)
    return x + y if residual else y


def lora_output_mlp_reference(
    mixed: Tensor, residual: Tensor, output: LoraWeights, norm: NormWeights, gates: Sequence[LoraWeights],
    down: LoraWeights, activation: Activation = "silu",
) -> Tensor:  # fmt: skip
    """The plain definition, differentiable; the same result as `lora_output_mlp`."""
    x = residual + lora_linear_reference(mixed, output)
    return lora_mlp_reference(x, norm, gates, down, activation, residual=True)


def add_lora_mlp_reference(
    y: Tensor, residual: Tensor, norm: NormWeights, gates: Sequence[LoraWeights], down: LoraWeights,
    activation: Activation = "silu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The plain definition, differentiable; the same results as `add_lora_mlp`."""
    x = y + residual
    return lora_mlp_reference(x, norm, gates, down, activation), x


def lora_linear(x: Tensor, lora: LoraWeights, residual: Tensor | None = None) -> Tensor:
    """x [T, K] -> [T, N], plus `residual` [T, N] where given. Saves x and x @ a.T. Differentiable once.

    On a GPU, up to 256 rows without a gradient (a model that answers) are one kernel.
    """
    options, tensors = flatten([lora], x)
    if lora.a is not None and lora.b is not None and _is_small(x, lora):
        from llamahome.kernels.lora_triton import lora_linear as small

        y: Tensor = small(x.to(options.dtype), lora.weight, lora.bias, lora.a, lora.b, lora.scaling)[0]
        return y if residual is None else residual + y
    return _linear(x, residual, options, tensors)


def _is_small(x: Tensor, lora: LoraWeights) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not use_triton(x) or lora.dropout:
        return False
    from llamahome.kernels.lora_triton import fits

    few: bool = fits(x, lora.weight)
    return few


def norm_lora_linears(
    x: Tensor, norm: NormWeights | None, loras: Sequence[LoraWeights], angles: Angles | None = None
) -> tuple[Tensor, ...]:
    """Several projections of one normalised input, x [T, K] -> one [T, N] each; `norm` None leaves the norm out.

    angles: turn the first two results, queries and keys, as `rope.rotate` does it with their heads. On a GPU the
        rotation then adds their rank-r parts.

    Saves x, the norm's 1 / rms per row, x @ [a, ...].T, and the angles. Differentiable once, not by the angles.
    """
    weight, eps, offset = norm or (None, 0.0, 0.0)
    cos, sin, size = angles or (None, None, 0)
    return _norm_linears(x, weight, cos, sin, (eps, offset, size), *flatten(loras, x))


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
    flags = (eps, offset, activation, residual, recompute, False)
    return _mlp(x, None, weight, flags, *flatten([*gates, down], x))[0]


def lora_output_mlp(
    mixed: Tensor, residual: Tensor, output: LoraWeights, norm: NormWeights, gates: Sequence[LoraWeights],
    down: LoraWeights, activation: Activation = "silu", *, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """From attention's result to the layer's: x + MLP(norm x) with x = residual + output(mixed), as `lora_mlp`.

    mixed [T, a], residual [T, h] -> [T, h]. On a GPU the norm's kernel adds residual and the rank-r part of `output`.
    Saves what `lora_linear` of `mixed` and `lora_mlp` of x save. Differentiable once.
    """
    flags = (norm.eps, norm.offset, activation, True, recompute, True)
    return _mlp(residual, mixed, norm.weight, flags, *flatten([output, *gates, down], residual))[0]


def add_lora_mlp(
    y: Tensor, residual: Tensor, norm: NormWeights, gates: Sequence[LoraWeights], down: LoraWeights,
    activation: Activation = "silu", *, recompute: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(MLP(norm x), x) with x = y + residual, all [T, h]: for a layer that norms both branches before it adds them.

    On a GPU the norm's kernel makes the sum. Saves what `lora_mlp` of x saves. Differentiable once.
    """
    flags = (norm.eps, norm.offset, activation, False, recompute, False)
    out, x = _mlp(residual, y, norm.weight, flags, *flatten([*gates, down], residual))
    assert x is not None
    return out, x


def _linear(x: Tensor, residual: Tensor | None, options: Options, tensors: Tensors) -> Tensor:
    y: Tensor = _Linear.apply(x, residual, options, *tensors)  # type: ignore[no-untyped-call]
    return y


def _norm_linears(
    x: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, numbers: tuple[float, float, int],
    options: Options, tensors: Tensors,
) -> tuple[Tensor, ...]:  # fmt: skip
    outs: tuple[Tensor, ...] = _NormLinears.apply(x, norm, cos, sin, numbers, options, *tensors)  # type: ignore[no-untyped-call]
    return outs


def _mlp(
    x: Tensor, mixed: Tensor | None, norm: Tensor | None, flags: Any, options: Options, tensors: Tensors
) -> tuple[Tensor, Tensor | None]:
    y, summed = _Mlp.apply(x, mixed, norm, flags, options, *tensors)  # type: ignore[no-untyped-call]
    return y, summed


# For torch.compiler.allow_in_graph: dynamo's own tracing of autograd functions fails on them (torch 2.13), while
# AOTAutograd, which then traces them by running them, sees forward and backward as they are.
TRACED_BY_RUNNING = (_linear, _norm_linears, _mlp)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, residual: Tensor | None, options: Options, *tensors: Tensor | None,  # noqa: ANN001
    ) -> Tensor:  # fmt: skip
        loras = unflatten(tensors, options)
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
        ctx, x: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None,  # noqa: ANN001
        numbers: tuple[float, float, int], options: Options, *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        loras = unflatten(tensors, options)
        eps, ctx.offset, ctx.size = numbers
        y, rstd = _normalised(x, norm, eps, ctx.offset)
        bare = loras if cos is None else [*(bare_projection(x, lora) for lora in loras[:2]), *loras[2:]]
        outs, xa, masks = project(y.to(options.dtype), bare)
        if cos is not None and sin is not None:
            updates = low_ranks(xa, bare, loras)
            heads = [
                _turned(out, cos, sin, ctx.size, update=part) for out, part in zip(outs[:2], updates, strict=False)
            ]
            outs = [*heads, *outs[2:]]
        ctx.save_for_backward(x, norm, rstd, xa, cos, sin, *tensors, *masks)
        ctx.options = options
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outs: Tensor):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        (x, norm, rstd, xa, cos, sin), loras, masks = _saved(ctx, 6)
        need_x, need_norm = ctx.needs_input_grad[:2]
        y = x if norm is None else rms_norm_apply(x, norm, rstd, ctx.offset)
        d_low = [d_out.to(ctx.options.dtype) for d_out in d_outs]
        if cos is not None:
            d_low[:2] = [_turned(d_out, cos, sin, ctx.size, inverse=True) for d_out in d_low[:2]]
        d_y, grads = project_backward(
            d_low, y.to(ctx.options.dtype), xa, loras, masks, ctx.needs_input_grad[6:], need_x or need_norm
        )
        d_x, d_norm = _norm_backward(d_y, x, norm, rstd, ctx.offset, need_norm, None)
        return d_x, d_norm, *[None] * 4, *grads, *ctx.options.no_gradients


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, size: int, *, inverse: bool = False, update: LowRank | None = None
) -> Tensor:
    """Heads that stand in a row, [T, H * D], turned."""
    turned: Tensor = rope_apply(x.view(x.shape[0], -1, size), cos, sin, inverse, update)
    return turned.flatten(1)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, mixed: Tensor | None, norm: Tensor | None, flags: Any, options: Options,  # noqa: ANN001
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        eps, offset, activation, residual, recompute, has_output = flags
        *gates, down = unflatten(tensors, options)
        xa_output: Tensor | None = None
        mask_output: list[Tensor] = []
        ctx.mixed_dtype = None if mixed is None else mixed.dtype
        if mixed is None:
            y, rstd = _normalised(x, norm, eps, offset)
        elif has_output:
            output, *gates = gates
            y, rstd, x, xa_output, mask_output = _joined(mixed.to(options.dtype), x, output, norm, eps, offset)
        else:
            y, rstd, x = rms_norm_forward(mixed, norm, eps, offset, x)
            mixed = None  # its gradient is the sum's, and needs nothing kept
        bare = bare_gates(x, gates)
        outs, xa, masks = project(y.to(options.dtype), bare)
        h = gated_forward(*_halves(outs), activation, gated_update(bare, gates, xa))
        out: Tensor
        (out,), xa_down, mask_down = project(h, [down], x if residual else None)
        ctx.count = 0 if recompute else len(outs)
        kept = (x, mixed, norm, rstd, xa_output, xa, xa_down, *outs[: ctx.count])
        ctx.save_for_backward(*kept, *tensors, *mask_output, *masks, *mask_down)
        ctx.options, ctx.flags = options, flags
        return out, x if ctx.mixed_dtype is not None and not has_output else None

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, d_sum: Tensor | None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN205
        (x, mixed, norm, rstd, xa_output, xa, xa_down, *outs), loras, masks = _saved(ctx, 7 + ctx.count)
        _, offset, activation, residual, _, has_output = ctx.flags
        need_x, need_mixed, need_norm = ctx.needs_input_grad[:3]
        needs, dtype = ctx.needs_input_grad[5:], ctx.options.dtype
        first = int(has_output)
        gates, down = loras[first:-1], loras[-1]
        y = (x if norm is None else rms_norm_apply(x, norm, rstd, offset)).to(dtype)
        bare = bare_gates(x, gates)
        e, g = _halves(outs or outputs(y, xa, bare))
        d_low = d_out.to(dtype)
        d_xa = through_b([d_low], [down])
        d_h = input_gradient([d_low], d_xa, [down], masks[-1:])
        h, d_e, d_g = gated_backward(d_h, e, g, activation, gated_update(bare, gates, xa))
        split = 4 * (len(loras) - 1)
        grads_down = weight_gradients([d_low], d_xa, h, xa_down, [down], masks[-1:], needs[split:])
        del d_h, h, e, g, outs
        d_outs = [d_e, d_g] if len(gates) == 2 else [torch.cat((d_e, d_g), -1)]
        del d_e, d_g
        need_sum = need_x or need_mixed or need_norm or any(needs[: 4 * first])
        d_y, grads = project_backward(d_outs, y, xa, gates, masks[first:-1], needs[4 * first : split], need_sum)
        del d_outs, y
        d_x, d_norm = _norm_backward(d_y, x, norm, rstd, offset, need_norm, d_out if residual else d_sum)
        d_mixed, grads_output = d_x, []
        if has_output and d_x is not None:
            d_mixed, grads_output = project_backward(
                [d_x.to(dtype)], mixed.to(dtype), xa_output, loras[:1], masks[:1], needs[:4], need_mixed
            )
        d_mixed = d_mixed.to(ctx.mixed_dtype) if d_mixed is not None and need_mixed else None
        grads = [*grads_output, *grads, *grads_down, *ctx.options.no_gradients]
        return d_x if need_x else None, d_mixed, d_norm, None, None, *grads


def _joined(
    mixed: Tensor, residual: Tensor, output: LoraWeights, norm: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    """(norm of the sum, its 1 / rms, residual + output(mixed), mixed @ a.T, dropout masks)."""
    bare = bare_projection(mixed, output)
    if bare is output or norm is None:  # the product's own accumulator adds the residual
        (x,), xa, masks = project(mixed, [output], residual)
        return *_normalised(x, norm, eps, offset), x, xa, masks
    (product,), xa, masks = project(mixed, [bare])
    y, rstd, x = rms_norm_forward(product, norm, eps, offset, residual, low_ranks(xa, [bare], [output])[0])
    assert x is not None
    return y, rstd, x, xa, masks


def _saved(ctx: Any, count: int) -> tuple[tuple[Tensor, ...], list[LoraWeights], list[Tensor | None]]:
    """The first `count` saved tensors, the group, and a dropout mask or None for each of its projections."""
    tensors = ctx.saved_tensors
    end = count + 4 * ctx.options.projections + len(ctx.options.no_gradients)
    loras = unflatten(tensors[count:end], ctx.options)
    drawn = iter(tensors[end:])
    return tensors[:count], loras, [next(drawn) if drops(lora) else None for lora in loras]


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
