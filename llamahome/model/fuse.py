"""`fuse(model)`: the decoder layers of one model compute by the engine's operations, which keep less for backward.

A fused layer keeps its modules, parameters and names; only its `forward` is replaced, on this instance. It computes
what transformers' own forward computes, with an adapter of PEFT on it or without, frozen or trained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llamahome.kernels.lora import (
    Angles,
    LoraWeights,
    NormWeights,
    add_lora_mlp,
    lora_linear,
    lora_mlp,
    lora_output_mlp,
    norm_lora_linears,
)
from llamahome.kernels.nf4 import Nf4Weight, from_bitsandbytes
from llamahome.kernels.norm import rms_norm
from llamahome.kernels.rope import rotate
from llamahome.model.compile import decoder_layers


@dataclass(frozen=True)
class Family:
    """How a decoder layer of transformers is built; names are those of its submodules.

    `pre_` norms come before attention and MLP, `post_` norms after them and before the residual addition.
    """

    pre_attention: str | None = "input_layernorm"
    post_attention: str | None = None
    pre_mlp: str | None = "post_attention_layernorm"
    post_mlp: str | None = None
    norm_offset: float = 0.0
    fused_norm: bool = True  # the norm is an RMS norm that rounds as `rms_norm` does
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gates: tuple[str, ...] = ("gate_proj", "up_proj")
    norm_width: bool = False  # q_norm and k_norm are over all heads together, not over each
    window_of_config: bool = False  # the sliding window is the configuration's, not the layer's own
    softcap: bool = False


_GEMMA = Family(
    post_attention="post_attention_layernorm", pre_mlp="pre_feedforward_layernorm",
    post_mlp="post_feedforward_layernorm", norm_offset=1.0,
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "LlamaDecoderLayer": Family(),  # SmolLM and SmolLM2 too
    "MistralDecoderLayer": Family(window_of_config=True),
    "Qwen2DecoderLayer": Family(),
    "Qwen3DecoderLayer": Family(),
    "SmolLM3DecoderLayer": Family(),
    "Gemma2DecoderLayer": Family(**{**vars(_GEMMA), "softcap": True}),
    "Gemma3DecoderLayer": _GEMMA,
    "Phi3DecoderLayer": Family(qkv=("qkv_proj",), gates=("gate_up_proj",), window_of_config=True),
    "OlmoDecoderLayer": Family(fused_norm=False),
    "Olmo2DecoderLayer": Family(
        pre_attention=None, post_attention="post_attention_layernorm", pre_mlp=None,
        post_mlp="post_feedforward_layernorm", fused_norm=False, norm_width=True,
    ),
}  # fmt: skip


@dataclass
class FuseReport:
    """What `fuse` did: names of modules, and for those left as they were the reason."""

    swapped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every swapped module its own forward pass back; a second call does nothing."""
        while self._modules:
            del self._modules.pop().forward
        self.swapped.clear()

    def summary(self) -> str:
        """One line for a person."""
        reasons = sorted(set(self.kept.values()))
        return f"{len(self.swapped)} layers fused" + (f"; not all: {'; '.join(reasons)}" if reasons else "")


def fuse(model: Any, *, recompute_mlp: bool = False) -> FuseReport:
    """Replace the forward pass of the decoder layers of a transformers model, plain or wrapped by PEFT, in place.

    Parameters, their names and the state dict stay. A projection that has no fused path (DoRA, several adapters at
    once, quantized weights) is called as the module that it is, and generation with a key-value cache runs
    transformers' own code. Attention weights cannot be returned from a fused layer. Do it before `torch.compile`.

    recompute_mlp: make the MLP's gate and up products again in backward, which saves 4 bytes of 2-byte types per token
    and MLP width for 4 operations per weight of the two.
    """
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    report = FuseReport()
    names = {module: name for name, module in causal.named_modules()}
    for layer in decoder_layers(causal):
        name, family = names[layer], FAMILIES.get(type(layer).__name__)
        reason = f"{type(layer).__name__} is not known" if family is None else _misfit(layer)
        if family is None or reason:
            report.kept[name] = reason or ""
            continue
        for part, fault in _unfused_parts(layer, family):
            report.kept[f"{name}.{part}"] = fault
        layer.forward = MethodType(_checkpointed(_forward_of(family, recompute_mlp)), layer)
        report.swapped.append(name)
        report._modules.append(layer)
    return report


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """transformers checkpoints a layer in its class's `forward`, which a layer's own hides."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            return layer._gradient_checkpointing_func(partial(forward, layer, **kwargs), *args)
        return forward(layer, *args, **kwargs)

    return call


def knows(model_type: str | None) -> bool:
    """Whether `fuse` has a forward pass for the layers of a model by the `model_type` in its config.json."""
    names = {name.removesuffix("DecoderLayer").lower() for name in FAMILIES}
    return (model_type or "").removesuffix("_text") in names


def _misfit(layer: Any) -> str | None:
    """Why the layer must keep its own forward pass."""
    if "forward" in vars(layer):
        return "its forward is replaced already"
    hooked = [m for m in layer.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    if hooked:
        return f"a {type(hooked[0]).__name__} in it has hooks"
    if getattr(layer.self_attn.config, "clip_qkv", None) is not None:
        return "its queries, keys and values are clipped"
    if any(isinstance(m, nn.Dropout) and m.p for n, m in layer.named_children() if n.startswith("resid_")):
        return "it has dropout on the residual stream"
    return None


def _unfused_parts(layer: Any, family: Family) -> list[tuple[str, str]]:
    """Projections and activations of the layer that are called as modules, and why."""
    paths = [f"self_attn.{name}" for name in (*family.qkv, "o_proj")]
    paths += [f"mlp.{name}" for name in (*family.gates, "down_proj")]
    kinds = [(path, layer.get_submodule(path)) for path in paths]
    faults = [(path, f"{_kind(module)} has no fused path") for path, module in kinds if projection(module) is None]
    norms = [] if family.fused_norm else [item for item in layer.named_modules() if item[0].endswith("norm")]
    faults += [(name, f"{type(norm).__name__} has no fused path") for name, norm in norms]
    if _activation(layer.mlp) is None:
        faults.append(("mlp", f"the activation {layer.mlp.config.hidden_act!r} has no fused path"))
    return faults


def _kind(module: Any) -> str:
    variants = getattr(module, "lora_variant", None)
    return type(next(iter(variants.values()))).__name__ if variants else type(module).__name__


def projection(module: Any) -> LoraWeights | None:
    """A linear layer's weights and those of the LoRA adapter that PEFT put on it; None where it is more than that."""
    base = getattr(module, "base_layer", module)
    weight = _weight(base)
    if weight is None or (base is not module and not hasattr(module, "lora_A")):
        return None
    bare = LoraWeights(weight, base.bias)
    if base is module:
        return bare
    if module.merged:
        return None if module.disable_adapters else bare
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return bare
    name = active[0]
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if len(active) > 1 or name in module.lora_variant or type(a) is not nn.Linear or b.bias is not None:
        return None
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return LoraWeights(weight, base.bias, a.weight, b.weight, float(module.scaling[name]), p)


def _weight(base: Any) -> Tensor | Nf4Weight | None:
    """A linear layer's weight, dense or in bitsandbytes' 4 bits; None for other layers."""
    if type(base) is nn.Linear:
        return base.weight
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    known = type(base).__name__ == "Linear4bit" and state is not None and state.quant_type == "nf4"
    return from_bitsandbytes(base.weight) if known else None


def _forward_of(family: Family, recompute_mlp: bool) -> Callable[..., Tensor]:
    """The forward method of a fused layer."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None, past_key_values: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if past_key_values is not None or position_embeddings is None:
            own: Tensor = type(self).forward(
                self, hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings,
                past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
            return own
        x = hidden_states.flatten(0, 1)
        mixed = _attention(self, family, x, hidden_states.shape, position_embeddings, attention_mask, kwargs)
        y = _after_attention(self, family, mixed, x, recompute_mlp)
        # Not marked as a view: FSDP2 warns of a layer that returns one, which somebody might change in place.
        result: Tensor = torch.ops.aten._unsafe_view.default(y, hidden_states.shape)
        return result

    return forward


def _attention(
    layer: Any, family: Family, x: Tensor, shape: torch.Size, angles: tuple[Tensor, Tensor], mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """From the layer's input [B * T, h] to the output projection's input [B * T, Hq * D]."""
    attn = layer.self_attn
    turn = None
    if getattr(attn, "use_rope", True):
        turn = Angles(*(part.expand(shape[0], -1, -1).flatten(0, 1) for part in angles), attn.head_dim)
    direct = turn if len(family.qkv) == 3 and getattr(attn, "q_norm", None) is None else None
    outs, turned = _linears(layer, family, family.pre_attention, attn, family.qkv, x, direct)
    q, k, v = _heads(attn, outs, family)
    if turn is not None and not turned:
        q, k = rotate(q, k, turn.cos, turn.sin)
    q, k, v = (part.view(*shape[:2], *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
    window = attn.config.sliding_window if family.window_of_config else getattr(attn, "sliding_window", None)
    if window is not None:
        kwargs["sliding_window"] = window
    if family.softcap:
        kwargs["softcap"] = attn.attn_logit_softcapping
    dropout = attn.attention_dropout if layer.training else 0.0
    out, _ = _interface(attn)(attn, q, k, v, mask, dropout=dropout, scaling=attn.scaling, **kwargs)
    flat: Tensor = out.reshape(x.shape[0], -1)
    return flat


def _interface(attn: Any) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that the model's configuration names."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(attn).__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        attn.config._attn_implementation, eager
    )
    return found


def _heads(attn: Any, outs: tuple[Tensor, ...], family: Family) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as heads [T, H, D], with their own norms where the architecture has them."""
    size, num_keys = attn.head_dim, attn.config.num_key_value_heads
    if len(outs) == 1:
        width = attn.config.num_attention_heads * size
        outs = torch.split(outs[0], [width, num_keys * size, num_keys * size], -1)
    q, k, v = outs
    norms = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    if family.norm_width:
        q, k = norms[0](q), norms[1](k)  # type: ignore[misc]
    q, k, v = (part.view(-1, part.shape[-1] // size, size) for part in (q, k, v))
    if norms[0] is not None and not family.norm_width:
        q, k = (rms_norm(part, *_norm(norm, family)) for part, norm in zip((q, k), norms, strict=True))
    return q, k, v


def _linears(
    layer: Any, family: Family, norm: str | None, owner: Any, names: tuple[str, ...], x: Tensor, angles: Angles | None
) -> tuple[tuple[Tensor, ...], bool]:
    """Projections of one input after the norm called `norm`, and whether the first two are turned by `angles`."""
    modules = [getattr(owner, name) for name in names]
    loras = [projection(module) for module in modules]
    known = [lora for lora in loras if lora is not None]
    fused = norm is not None and family.fused_norm and len(known) == len(loras)
    y = x if norm is None or fused else getattr(layer, norm)(x)
    if len(known) < len(loras):
        return tuple(module(y) for module in modules), False
    outs: tuple[Tensor, ...] = norm_lora_linears(
        y, _norm(getattr(layer, norm or ""), family) if fused else None, known, angles
    )
    return outs, angles is not None


def _after_attention(layer: Any, family: Family, mixed: Tensor, x: Tensor, recompute: bool) -> Tensor:
    """The layer's output from its input x and attention's result.

    One operation adds the residual and norms the sum, where nothing else stands between: with the projection before it
    if that has no norm of its own, as in Llama, or after that norm, as in Gemma.
    """
    output = projection(layer.self_attn.o_proj)
    parts = _mlp_parts(layer, family)
    if family.pre_mlp is None or not family.fused_norm or output is None or parts is None:
        x = _output(layer, family.post_attention, layer.self_attn.o_proj, mixed, x, family)
        return _mlp(layer, family, x, recompute)
    *gates, down = parts
    norm, activation = _norm(getattr(layer, family.pre_mlp), family), _activation(layer.mlp)
    if family.post_attention is None and family.post_mlp is None:
        whole: Tensor = lora_output_mlp(mixed, x, output, norm, gates, down, activation, recompute=recompute)
        return whole
    branch = _apply_norm(layer, family.post_attention, lora_linear(mixed, output), family)
    y, x = add_lora_mlp(branch, x, norm, gates, down, activation, recompute=recompute)
    return x + _apply_norm(layer, family.post_mlp, y, family)


def _mlp_parts(layer: Any, family: Family) -> list[LoraWeights] | None:
    """Gates and down projection of the MLP; None where one of them, or the activation, has no fused path."""
    found = [projection(getattr(layer.mlp, name)) for name in (*family.gates, "down_proj")]
    known = [lora for lora in found if lora is not None]
    return known if len(known) == len(found) and _activation(layer.mlp) is not None else None


def _output(layer: Any, norm: str | None, module: Any, x: Tensor, residual: Tensor, family: Family) -> Tensor:
    """residual + norm(module(x)), the norm where there is one."""
    lora = projection(module)
    alone = norm is None and lora is not None  # the residual is then added by the product
    y: Tensor = module(x) if lora is None else lora_linear(x, lora, residual if alone else None)
    return y if alone else residual + _apply_norm(layer, norm, y, family)


def _mlp(layer: Any, family: Family, x: Tensor, recompute: bool) -> Tensor:
    """x + the layer's MLP with its norms."""
    known = _mlp_parts(layer, family)
    alone = family.post_mlp is None  # the residual is then added by the last product
    y: Tensor
    if known is None:
        alone, y = False, layer.mlp(_apply_norm(layer, family.pre_mlp, x, family))
    else:
        fused = family.pre_mlp is not None and family.fused_norm
        alone = alone and fused
        norm = _norm(getattr(layer, family.pre_mlp or ""), family) if fused else None
        start = x if fused else _apply_norm(layer, family.pre_mlp, x, family)
        y = lora_mlp(start, norm, known[:-1], known[-1], _activation(layer.mlp), residual=alone, recompute=recompute)
    return y if alone else x + _apply_norm(layer, family.post_mlp, y, family)


def _apply_norm(layer: Any, name: str | None, x: Tensor, family: Family) -> Tensor:
    if name is None:
        return x
    module = getattr(layer, name)
    y: Tensor = rms_norm(x, *_norm(module, family)) if family.fused_norm else module(x)
    return y


def _norm(module: Any, family: Family) -> NormWeights:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return NormWeights(module.weight, eps, family.norm_offset)


def _activation(mlp: Any) -> Any:
    """The name that the kernels have for the MLP's activation, or None."""
    function = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
    return _ACTIVATIONS.get(type(function).__name__)


# transformers' classes behind its names "silu" (SiLUActivation or nn.SiLU) and "gelu_pytorch_tanh".
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
