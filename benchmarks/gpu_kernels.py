"""What `gpu.py` checks and times: each kernel beside its rivals, at the sizes of a model's layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llamahome.kernels import nf4
from llamahome.kernels.attention import _Attention, varlen_attention_reference
from llamahome.kernels.lora import (
    Angles,
    LoraWeights,
    NormWeights,
    lora_linear,
    lora_linear_reference,
    lora_mlp,
    lora_mlp_reference,
    lora_output_mlp,
    lora_output_mlp_reference,
    norm_lora_linears,
    norm_lora_linears_reference,
)
from llamahome.kernels.loss import linear_cross_entropy, linear_cross_entropy_reference
from llamahome.kernels.mlp import gated, gated_reference
from llamahome.kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from llamahome.kernels.rope import rotate, rotate_reference

Operation = Callable[..., Any]  # tensors in, a tensor or several out


class Shape(NamedTuple):
    """Layer sizes of a model, and tokens of a row made of four samples of one length."""

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tokens: int
    rank: int


SHAPES = (
    Shape("Llama-3-8B", 4096, 14336, 32, 8, 128, 128256, 8192, 16),
    Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256, 8192, 16),
)
TINY = Shape("tiny", 64, 128, 4, 2, 16, 96, 32, 4)
SAMPLES = 4
FEW = 64  # rows of a batch of answers


class Case(NamedTuple):
    """One operation: ours, its plain definition, and others that compute the same from the same tensors.

    `inputs` makes the tensors for a number of tokens; floating ones get gradients, unless their name is in `frozen`.
    `isolated`: tokens are those of packed samples, of which none may change another's bits.
    """

    name: str
    ours: Operation
    reference: Operation
    rivals: dict[str, Operation]
    inputs: Callable[[int], dict[str, Tensor]]
    frozen: tuple[str, ...] = ()
    isolated: bool = False
    forward_only: bool = False


def cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """The dearest first, should time run out."""
    makers = (
        _attention, _windowed_attention, _projections, _mlp, _output_mlp, _loss, _capped_attention, _norm, _add_norm,
        _rope, _gated, _few_rows, _few_rows_nf4, _dequantize,
    )  # fmt: skip
    for make in makers:
        yield make(shape, device)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _normal(device: torch.device, *size: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*size, device=device) * scale).bfloat16()


def _edges(tokens: int, device: torch.device) -> Tensor:
    return torch.arange(SAMPLES + 1, device=device, dtype=torch.int32) * (tokens // SAMPLES)


def _qkv(shape: Shape, device: torch.device, tokens: int) -> dict[str, Tensor]:
    sizes = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
    return {name: _normal(device, tokens, heads, shape.head_dim) for name, heads in sizes.items()}


def _attention(shape: Shape, device: torch.device, window: int = 0, softcap: float = 0.0) -> Case:
    scale = shape.head_dim**-0.5

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        # The kernel itself: `varlen_attention` would hand such a row to torch's FlashAttention.
        return _Attention.apply(q, k, v, _edges(q.shape[0], device), scale, window, softcap)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention_reference(q, k, v, _edges(q.shape[0], device), scale, window, softcap)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.unflatten(0, (SAMPLES, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Any:
        from torch.nn.attention.varlen import varlen_attn

        edges, longest = _edges(q.shape[0], device), q.shape[0] // SAMPLES
        return varlen_attn(
            q, k, v, edges, edges, longest, longest, scale=scale, window_size=(window - 1, 0), enable_gqa=True
        )

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Any:
        from flash_attn import flash_attn_varlen_func

        edges, longest = _edges(q.shape[0], device), q.shape[0] // SAMPLES
        return flash_attn_varlen_func(
            q, k, v, edges, edges, longest, longest, softmax_scale=scale, causal=True, window_size=(window - 1, 0),
            softcap=softcap,
        )  # fmt: skip

    rivals: dict[str, Operation] = {} if window or softcap else {"sdpa": sdpa}
    if device.type == "cuda" and not softcap:
        rivals["varlen_attn"] = varlen
    if installed("flash_attn"):
        rivals["flash-attn"] = flash
    name = "attention" + (f", window {window}" if window else "") + (f", soft-cap {softcap:g}" if softcap else "")
    return Case(name, ours, plain, rivals, lambda tokens: _qkv(shape, device, tokens), isolated=True)


def _windowed_attention(shape: Shape, device: torch.device) -> Case:
    return _attention(shape, device, window=shape.tokens // SAMPLES // 4)


def _capped_attention(shape: Shape, device: torch.device) -> Case:
    if device.type == "cuda":
        return _attention(shape, device, softcap=50.0)
    return _attention(shape, device)._replace(name="attention, soft-cap 50")  # no kernel of a CPU has soft-caps


def _norm(shape: Shape, device: torch.device) -> Case:
    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-5)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, 1e-5)

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)

    def liger(x: Tensor, weight: Tensor) -> Any:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)

    rivals: dict[str, Operation] = {"F.rms_norm": torchs} | ({"Liger": liger} if installed("liger_kernel") else {})
    return Case("rms_norm", ours, reference, rivals, lambda tokens: _rows(shape, device, tokens, "x"), ("weight",))


def _add_norm(shape: Shape, device: torch.device) -> Case:
    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return add_rms_norm(x, residual, weight, 1e-5)

    def reference(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return add_rms_norm_reference(x, residual, weight, 1e-5)

    inputs = lambda tokens: _rows(shape, device, tokens, "x", "residual")  # noqa: E731
    return Case("add_rms_norm", ours, reference, {}, inputs, ("weight",))


def _rows(shape: Shape, device: torch.device, tokens: int, *names: str) -> dict[str, Tensor]:
    rows = {name: _normal(device, tokens, shape.hidden) for name in names}
    return rows | {"weight": 1 + _normal(device, shape.hidden, scale=0.1)}


def _rope(shape: Shape, device: torch.device) -> Case:
    def inputs(tokens: int) -> dict[str, Tensor]:
        qkv = _qkv(shape, device, tokens)
        return {"q": qkv["q"], "k": qkv["k"]} | _angles(shape, device, tokens)

    def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        from liger_kernel.ops.rope import LigerRopeFunction

        heads_first = (x.transpose(0, 1)[None] for x in (q, k))
        return LigerRopeFunction.apply(*heads_first, cos[None], sin[None])

    rivals = {"Liger": liger} if installed("liger_kernel") else {}
    return Case("rope", rotate, rotate_reference, rivals, inputs, ("cos", "sin"))


def _angles(shape: Shape, device: torch.device, tokens: int) -> dict[str, Tensor]:
    half = shape.head_dim // 2
    angles = torch.arange(tokens, device=device)[:, None] * 10000.0 ** -(torch.arange(half, device=device) / half)
    angles = torch.cat((angles, angles), -1)
    return {"cos": angles.cos().bfloat16(), "sin": angles.sin().bfloat16()}


def _gated(shape: Shape, device: torch.device) -> Case:
    def liger(e: Tensor, g: Tensor) -> Any:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(e, g)

    rivals = {"Liger": liger} if installed("liger_kernel") else {}
    inputs = lambda tokens: {name: _normal(device, tokens, shape.mlp) for name in ("e", "g")}  # noqa: E731
    return Case("gated", gated, gated_reference, rivals, inputs)


def _loss(shape: Shape, device: torch.device) -> Case:
    def inputs(tokens: int) -> dict[str, Tensor]:
        labels = torch.randint(shape.vocabulary, (tokens,), device=device)
        weight = _normal(device, shape.vocabulary, shape.hidden, scale=shape.hidden**-0.5)
        return {"hidden": _normal(device, tokens, shape.hidden), "weight": weight, "labels": labels}

    def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]

    rivals = {"Liger": liger} if installed("liger_kernel") else {}
    return Case(
        "linear_cross_entropy", linear_cross_entropy, linear_cross_entropy_reference, rivals, inputs,
        ("weight",),
    )  # fmt: skip


def _adapted(shape: Shape, device: torch.device, sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Weights and adapters of named projections, (outputs, inputs) each: `q_w`, `q_a`, `q_b`."""
    made = {}
    for name, (outputs, inputs) in sizes.items():
        made[f"{name}_w"] = _normal(device, outputs, inputs, scale=inputs**-0.5)
        made[f"{name}_a"] = _normal(device, shape.rank, inputs, scale=inputs**-0.5)
        made[f"{name}_b"] = _normal(device, outputs, shape.rank, scale=0.1)
    return made


def _loras(tensors: dict[str, Tensor], names: str) -> list[LoraWeights]:
    return [LoraWeights(tensors[f"{n}_w"], None, tensors[f"{n}_a"], tensors[f"{n}_b"], 2.0) for n in names]


def _projections(shape: Shape, device: torch.device) -> Case:
    key_values = shape.kv_heads * shape.head_dim
    sizes = {"q": (shape.heads * shape.head_dim, shape.hidden)} | dict.fromkeys("kv", (key_values, shape.hidden))

    def ours(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, **tensors: Tensor) -> Any:
        angles = Angles(cos, sin, shape.head_dim)
        return norm_lora_linears(x, NormWeights(weight, 1e-5), _loras(tensors, "qkv"), angles)

    def reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, **tensors: Tensor) -> Any:
        angles = Angles(cos, sin, shape.head_dim)
        return norm_lora_linears_reference(x, NormWeights(weight, 1e-5), _loras(tensors, "qkv"), angles)

    def inputs(tokens: int) -> dict[str, Tensor]:
        angles = _angles(shape, device, tokens)
        return _rows(shape, device, tokens, "x") | angles | _adapted(shape, device, sizes)

    frozen = ("weight", "cos", "sin", "q_w", "k_w", "v_w")
    return Case("norm + q, k, v with LoRA + rope", ours, reference, {}, inputs, frozen)


def _mlp(shape: Shape, device: torch.device) -> Case:
    sizes = dict.fromkeys("gu", (shape.mlp, shape.hidden)) | {"d": (shape.hidden, shape.mlp)}

    def ours(x: Tensor, weight: Tensor, **tensors: Tensor) -> Any:
        *gates, down = _loras(tensors, "gud")
        return lora_mlp(x, NormWeights(weight, 1e-5), gates, down, residual=True)

    def reference(x: Tensor, weight: Tensor, **tensors: Tensor) -> Any:
        *gates, down = _loras(tensors, "gud")
        return lora_mlp_reference(x, NormWeights(weight, 1e-5), gates, down, residual=True)

    def inputs(tokens: int) -> dict[str, Tensor]:
        return _rows(shape, device, tokens, "x") | _adapted(shape, device, sizes)

    return Case("MLP with LoRA", ours, reference, {}, inputs, ("weight", "g_w", "u_w", "d_w"))


def _output_mlp(shape: Shape, device: torch.device) -> Case:
    width = shape.heads * shape.head_dim
    sizes = {"o": (shape.hidden, width), "d": (shape.hidden, shape.mlp)}
    sizes |= dict.fromkeys("gu", (shape.mlp, shape.hidden))

    def form(function: Operation) -> Operation:
        def operation(x: Tensor, mixed: Tensor, weight: Tensor, **tensors: Tensor) -> Any:
            output, *gates, down = _loras(tensors, "ogud")
            return function(mixed, x, output, NormWeights(weight, 1e-5), gates, down)

        return operation

    def inputs(tokens: int) -> dict[str, Tensor]:
        mixed = {"mixed": _normal(device, tokens, width)}
        return _rows(shape, device, tokens, "x") | mixed | _adapted(shape, device, sizes)

    ours, reference = form(lora_output_mlp), form(lora_output_mlp_reference)
    frozen = ("weight", "o_w", "g_w", "u_w", "d_w")
    return Case("output + norm + MLP with LoRA", ours, reference, {}, inputs, frozen)


def _few_rows(shape: Shape, device: torch.device) -> Case:
    """A model that answers: without a gradient, on at most 64 rows."""
    sizes = {"d": (shape.hidden, shape.mlp)}

    def ours(x: Tensor, **tensors: Tensor) -> Tensor:
        return lora_linear(x, *_loras(tensors, "d"))

    def reference(x: Tensor, **tensors: Tensor) -> Tensor:
        return lora_linear_reference(x, *_loras(tensors, "d"))

    def inputs(tokens: int) -> dict[str, Tensor]:
        return {"x": _normal(device, min(tokens, FEW), shape.mlp)} | _adapted(shape, device, sizes)

    return Case("LoRA linear, few rows", ours, reference, {}, inputs, forward_only=True)


def _few_rows_nf4(shape: Shape, device: torch.device) -> Case:
    dense = _few_rows(shape, device)
    packed = nf4.quantize(_normal(device, shape.hidden, shape.mlp, scale=shape.mlp**-0.5))

    def form(function: Operation) -> Operation:
        def operation(x: Tensor, d_a: Tensor, d_b: Tensor, **_: Tensor) -> Any:
            return function(x, LoraWeights(packed, None, d_a, d_b, 2.0))

        return operation

    ours, reference = form(lora_linear), form(lora_linear_reference)
    return Case("LoRA linear in 4 bits, few rows", ours, reference, {}, dense.inputs, forward_only=True)


def _dequantize(shape: Shape, device: torch.device) -> Case:
    packed = nf4.quantize(_normal(device, shape.hidden, shape.mlp, scale=shape.mlp**-0.5))

    def reference(like: Tensor) -> Tensor:
        return nf4.dequantize_reference(packed, like.dtype)

    inputs = lambda _: {"like": _normal(device, 1)}  # noqa: E731
    return Case("4 bits made dense", lambda like: nf4.dequantize(packed, like.dtype), reference, {}, inputs,
                forward_only=True)  # fmt: skip
