"""First values of an adapter on a 4-bit base: no other product of its rank leaves less of the outputs' errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamahome.config import Config, ModelSettings
from llamahome.model.adapters import apply_adapter, trainable_parameters
from llamahome.model.load import load_model, resolve_model
from llamahome.model.quantize import dequantized
from llamahome.model.rounding_error import absorb_rounding_error, leading_vectors

pytest.importorskip("bitsandbytes")
IDS = torch.arange(3, 99)[None]


def load(folder: Path, *, nf4: bool) -> Any:
    source = resolve_model(str(folder), ModelSettings())
    return load_model(source, dtype=torch.float32, device="cpu", attention="sdpa", nf4=nf4)


def corrected(folder: Path, **settings: Any) -> tuple[Any, float]:
    values = {"training.method": "qlora", "lora.rank": 4, **settings}
    model = apply_adapter(load(folder, nf4=True), Config.load(None, values)).eval()
    return model, absorb_rounding_error(model, load(folder, nf4=False), lambda: model(IDS))


@pytest.mark.parametrize("shape", [(40, 30), (30, 200), (5, 3)])
def test_the_vectors_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found, count = leading_vectors(matrix, 4), min(4, *shape)
    exact = torch.linalg.svd(matrix.double()).U[:, :count].float()
    assert found.shape == (shape[0], count)
    torch.testing.assert_close(found.T @ found, torch.eye(count), rtol=1e-5, atol=1e-5)
    # With values as near as those of noise single vectors settle slowly; what they hold of the matrix does not.
    held, best = (float((vectors.T @ matrix).square().sum()) for vectors in (found, exact))
    assert held == pytest.approx(best, rel=3e-3)
    assert torch.equal(found, leading_vectors(matrix, 4))


def test_a_layer_begins_with_the_best_correction_of_its_rank(tiny_model_dir: Path) -> None:
    """Held to the closed form with the root of the inputs' second moments, in float64 (QERA, theorem 1)."""
    model, _ = corrected(tiny_model_dir)
    seen: dict[str, Tensor] = {}
    layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0][0].double()))
    model(IDS)
    exact = load(tiny_model_dir, nf4=False)
    for name, layer in layers.items():
        x, error = seen[name], (exact.get_submodule(name).weight.detach() - dequantized(layer.base_layer)).double()
        values, vectors = torch.linalg.eigh(x.T @ x)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        inverse = vectors * values.clamp_min(1e-9).rsqrt() @ vectors.T
        u, s, v = torch.linalg.svd(error @ root)
        best = u[:, :4] * s[:4] @ v[:4] @ inverse
        left = [
            float(((error - found) @ x.T).norm())
            for found in (best, layer.get_delta_weight("default").detach().double())
        ]
        assert left[1] == pytest.approx(left[0], rel=2e-2), name
        assert left[1] < 0.98 * float((error @ x.T).norm())


def test_both_factors_are_equally_large(tiny_model_dir: Path) -> None:
    model, _ = corrected(tiny_model_dir)
    for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"lora.use_rslora": True}, {"lora.use_dora": True}], ids=str)
def test_the_outputs_come_nearer_to_those_before_rounding(tiny_model_dir: Path, settings: dict[str, Any]) -> None:
    exact, rounded = (load(tiny_model_dir, nf4=nf4)(IDS).logits.detach() for nf4 in (False, True))
    few, many = (corrected(tiny_model_dir, **settings, **{"lora.rank": rank}) for rank in (4, 48))
    errors = [float((logits - exact).norm()) for logits in (rounded, few[0](IDS).logits, many[0](IDS).logits)]
    assert errors[2] < 0.6 * errors[1] < 0.6 * errors[0]
    assert 0 < few[1] < many[1] <= 1


def test_layers_that_are_not_in_4_bits_keep_their_values(tiny_model_dir: Path) -> None:
    values = {"lora.rank": 4, "training.method": "lora"}
    model = apply_adapter(load(tiny_model_dir, nf4=False), Config.load(None, values)).eval()
    before = [parameter.detach().clone() for _, parameter in trainable_parameters(model)]
    assert absorb_rounding_error(model, load(tiny_model_dir, nf4=False), lambda: model(IDS)) == 0
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, trainable_parameters(model), strict=True))


def test_the_hooks_are_gone_afterwards(tiny_model_dir: Path) -> None:
    model, _ = corrected(tiny_model_dir)
    before = [parameter.detach().clone() for _, parameter in trainable_parameters(model)]
    model(IDS.flip(1))
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, trainable_parameters(model), strict=True))
