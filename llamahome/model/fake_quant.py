"""Quantization-aware training: layers that compute with the numbers they will have once they are quantized.

Weights, and under one scheme activations, are rounded to integers times a scale in the forward pass; backward takes
the rounding for the identity (straight-through estimator, arXiv 1308.3432; as in arXiv 1712.05877). The arithmetic is
that of torchao's fake quantisers and of its converted layers, number by number, in ops that `torch.compile` fuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamahome.errors import ConfigError, MissingError

PAIRED, INT4, INT8 = "int8-dynamic-activation/int4-weight", "int4-weight", "int8-weight"


@dataclass(frozen=True)
class Scheme:
    """What is rounded: weights to 4 bits in groups of `group_size` along the input, or to 8 bits row by row.

    Under "int8-dynamic-activation/int4-weight" a layer's input is rounded to 8 bits too, each token for itself.
    """

    name: str
    group_size: int

    @property
    def bits(self) -> int:
        return 8 if self.name == INT8 else 4

    @property
    def activations(self) -> bool:
        return self.name == PAIRED

    def round_weight(self, weight: Tensor) -> Tensor:
        return round_weight(weight, self.bits, weight.shape[1] if self.name == INT8 else self.group_size)


def round_weight(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """weight [N, K] at integers of `bits` bits times a scale for each `group_size` numbers of a row; symmetric."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    groups = weight.reshape(weight.shape[0], -1, group_size)
    tiny = torch.finfo(weight.dtype).smallest_normal
    scale = (groups.abs().amax(-1, keepdim=True) / ((high - low) / 2)).clamp(min=tiny)
    return (groups * (1.0 / scale)).round().clamp(low, high).mul(scale).view(weight.shape)


def round_activations(x: Tensor) -> Tensor:
    """x [..., K] at 256 levels between the least and the largest number of each token, zero among them."""
    lowest, highest = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((highest - lowest) / 255.0).clamp(min=torch.finfo(x.dtype).smallest_normal)
    zero = (-128 - (lowest / scale).round()).clamp(-128, 127)
    return ((x * (1.0 / scale)).round() + zero).clamp(-128, 127).sub(zero).mul(scale)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme) -> Tensor:
        return scheme.round_weight(weight)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0], None


class _Activations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return round_activations(x)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return gradient[0]


class FakeQuantLinear(nn.Linear):
    """A linear layer in training for a `scheme`; made from a plain one in place, with the same parameters.

    A class of its own: PEFT takes it for the linear layer that it is, and fused layers leave it alone.
    """

    scheme: Scheme
    active: bool
    rounds_input: bool

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output for input x [..., K] with another `weight` [N, K]."""
        if self.active:
            weight = cast("Tensor", _Weight.apply(weight, self.scheme))  # type: ignore[no-untyped-call]
            if self.rounds_input:
                x = cast("Tensor", _Activations.apply(x))  # type: ignore[no-untyped-call]
        return F.linear(x, weight, self.bias)


def prepare(model: Any, scheme: Scheme) -> None:
    """Turn the linear layers of a transformers model, but for its output projection, into `FakeQuantLinear`, in place.

    Raises: ConfigError where a layer's input is no whole number of groups, or there is no linear layer.
    """
    head, found = model.get_output_embeddings(), 0
    for name, module in model.named_modules():
        if module is head or type(module) is not nn.Linear:
            continue
        if scheme.bits == 4 and module.in_features % scheme.group_size:
            raise ConfigError(f"{name} has {module.in_features} inputs, no multiple of {scheme.group_size}",
                              where="qat.group_size", fix="choose a divisor")  # fmt: skip
        module.__class__ = FakeQuantLinear
        vars(module).update(scheme=scheme, active=True, rounds_input=scheme.activations)
        found += 1
    if not found:
        raise ConfigError(f"{type(model).__name__} has no plain linear layers", where="training.method",
                          fix="use training.method: lora")  # fmt: skip


def join_adapter(model: Any) -> None:
    """Let prepared layers with a LoRA adapter round the sum of both, which is what a merge quantises."""
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), FakeQuantLinear):
            module.forward = MethodType(_joined, module)


def _joined(layer: Any, x: Tensor) -> Tensor:
    base = layer.base_layer
    if layer.disable_adapters:
        return cast("Tensor", base(x))
    name = layer.active_adapters[0]
    with torch.autocast(x.device.type, enabled=False):  # as a merge adds: in fp32
        update = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
        weight = base.weight.to(update.dtype) + update
    return cast("Tensor", base.compute(x, weight))


def fake_layers(model: nn.Module) -> Iterator[tuple[str, FakeQuantLinear]]:
    """Names and modules of the prepared layers; for those with an adapter that of the layer inside."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, FakeQuantLinear))


def switch(model: nn.Module, active: bool, *, activations: bool = True) -> None:
    """Turn rounding on or off, that of a layer's input apart."""
    for _, layer in fake_layers(model):
        layer.active, layer.rounds_input = active, activations and layer.scheme.activations


def from_step(model: nn.Module, start: int) -> Callable[[int], None]:
    """Called with the number of finished steps, it turns rounding on from `start` of them on, and off before."""
    return lambda step: switch(model, step >= start)


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """What a saved model says of its training, for `scheme_of`; None for a model that is not prepared."""
    layer = next(fake_layers(model), None)
    return None if layer is None else asdict(layer[1].scheme)


def scheme_of(record: Mapping[str, Any]) -> Scheme:
    return Scheme(str(record["name"]), int(record["group_size"]))


@torch.no_grad()
def fix_rounding(model: nn.Module) -> None:
    """Put plain linear layers with the rounded weights, in float32, in the place of prepared ones, in place."""
    for _, layer in list(fake_layers(model)):
        layer.weight.data = layer.scheme.round_weight(layer.weight.float())
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def convert(model: nn.Module) -> Any:
    """Turn prepared layers into torchao's quantized ones, in place; returns torchao's configuration.

    From float32 weights the integers and scales are exactly those of training. Raises: MissingError without torchao.
    """
    layers = dict(fake_layers(model))
    scheme = next(iter(layers.values())).scheme
    config = torchao_config(scheme)
    from torchao.quantization import quantize_

    for layer in layers.values():
        layer.__class__ = nn.Linear  # type: ignore[assignment]
    quantize_(model, config, filter_fn=lambda module, name: name in layers)
    return config


def torchao_config(scheme: Scheme) -> Any:
    """torchao's post-training configuration of the same arithmetic. Raises: MissingError."""
    try:
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis, PerGroup
    except ImportError as error:
        raise MissingError("converting needs the package torchao", where="qat.scheme",
                           fix='pip install "llamahome[qat]"') from error  # fmt: skip
    if scheme.name == INT8:
        return IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    group, four_bits = PerGroup(scheme.group_size), getattr(torch, "int4")  # noqa: B009  (torch's stubs have none)
    if scheme.activations:
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=four_bits, weight_granularity=group)
    return IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=group)
