"""The fake quantiser is torchao's, bit for bit; gradients pass it unchanged; a converted layer is the trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llamahome.config import Config, ModelSettings
from llamahome.errors import ConfigError
from llamahome.model.adapters import apply_adapter
from llamahome.model.fake_quant import (
    INT4,
    INT8,
    PAIRED,
    FakeQuantLinear,
    Scheme,
    convert,
    fake_layers,
    fix_rounding,
    prepare,
    switch,
    torchao_config,
)
from llamahome.model.fuse import fuse
from llamahome.model.load import load_model, resolve_model

pytest.importorskip("torchao")
SCHEMES = [Scheme(name, 32) for name in (PAIRED, INT4, INT8)]
IDS = torch.arange(3, 35)[None]


class Model(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 48)
        self.head = nn.Linear(48, 4)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def pair(scheme: Scheme, dtype: torch.dtype) -> tuple[Any, Any, torch.Tensor]:
    """Our prepared layer, torchao's with its weights, and an input with an outlier, a row of zeros, one of a sign."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    torch.manual_seed(3)
    own, theirs = Model().to(dtype), Model().to(dtype)
    own.inner.weight.data[0] = 0
    own.inner.weight.data[1, 5] = 9.0
    theirs.load_state_dict(own.state_dict())
    prepare(own, scheme)
    quantize_(theirs, QATConfig(torchao_config(scheme), step="prepare"), filter_fn=lambda m, n: n == "inner")
    x = torch.randn(7, 128, dtype=dtype)
    x[0, 3], x[1], x[2] = 30.0, 0.0, x[2].abs()
    return own.inner, theirs.inner, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_outputs_are_those_of_torchao(scheme: Scheme, dtype: torch.dtype) -> None:
    own, theirs, x = pair(scheme, dtype)
    assert isinstance(own, FakeQuantLinear)
    assert torch.equal(own(x), theirs(x))
    assert not torch.equal(own(x), nn.functional.linear(x, own.weight, own.bias))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_gradients_pass_straight_through(scheme: Scheme) -> None:
    """As torchao's do, but for the few numbers that it clamps and its gradient by the scale."""
    own, theirs, x = pair(scheme, torch.float32)
    given = torch.randn(7, 48)
    for layer, inputs in ((own, x.clone().requires_grad_()), (theirs, x.clone().requires_grad_())):
        layer(inputs).backward(given)
        layer.input_gradient = inputs.grad
    rounded = scheme.round_weight(own.weight.detach())
    torch.testing.assert_close(own.input_gradient, given @ rounded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.bias.grad, given.sum(0))
    cosine = torch.cosine_similarity(own.weight.grad.flatten(), theirs.weight.grad.flatten(), dim=0)
    assert float(cosine) > 0.99


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_rounding_twice_changes_nothing_and_errors_are_half_a_step(scheme: Scheme) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    rounded = scheme.round_weight(weight)
    steps = rounded.view(16, -1, 64 if scheme.name == INT8 else 32)
    scale = weight.view_as(steps).abs().amax(-1, keepdim=True) / (127.5 if scheme.name == INT8 else 7.5)
    levels = steps / scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=2e-5 * scheme.bits**2)
    assert ((rounded - weight).view_as(steps).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_the_converted_layer_has_the_outputs_of_training(scheme: Scheme) -> None:
    own, _, x = pair(scheme, torch.float32)
    model = Model()
    model.inner = own
    trained = own(x).detach()
    convert(model)
    assert type(model.inner) is nn.Linear
    assert type(model.inner.weight.data).__name__ == "IntxUnpackedToInt8Tensor"
    assert type(model.head.weight.data) is torch.Tensor
    assert torch.equal(model.inner(x), trained)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_fixed_weights_have_the_outputs_of_training(scheme: Scheme) -> None:
    own, _, x = pair(scheme, torch.float32)
    model = Model()
    model.inner = own
    switch(model, True, activations=False)
    trained = own(x).detach()
    fix_rounding(model)
    assert type(model.inner) is nn.Linear
    assert torch.equal(model.inner(x), trained)


def test_switched_off_it_is_the_plain_layer() -> None:
    own, _, x = pair(SCHEMES[0], torch.float32)
    own.active = False
    assert torch.equal(own(x), nn.functional.linear(x, own.weight, own.bias))


def test_widths_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="inner has 100 inputs, no multiple of 32") as caught:
        prepare(Model(100), SCHEMES[1])
    assert caught.value.where == "qat.group_size"
    prepare(Model(100), SCHEMES[2])


def load(folder: Path, **settings: Any) -> Any:
    model = load_model(resolve_model(str(folder), ModelSettings()), dtype=torch.float32, device="cpu", attention="sdpa")
    return apply_adapter(model, Config.load(None, {"training.method": "qat", "lora.rank": 4, **settings}))


@pytest.mark.parametrize("scheme", [PAIRED, INT4])
def test_an_adapter_is_rounded_together_with_its_base(tiny_model_dir: Path, scheme: str) -> None:
    model = load(tiny_model_dir, **{"qat.lora": True, "qat.scheme": scheme})
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    logits = model(IDS).logits.detach()
    merged = model.merge_and_unload()
    assert len(list(fake_layers(merged))) == 14
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_fused_layers_leave_prepared_ones_to_themselves(tiny_model_dir: Path, lora: bool) -> None:
    plain, fused = (load(tiny_model_dir, **{"qat.lora": lora}) for _ in range(2))
    fuse(fused)
    torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_it_compiles_in_one_piece(scheme: Scheme) -> None:
    own, _, x = pair(scheme, torch.float32)
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), own(x))
    compiled(x).sum().backward()
    assert own.weight.grad is not None
