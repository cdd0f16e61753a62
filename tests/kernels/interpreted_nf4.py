"""The Triton kernels of 4-bit weights against their plain definitions."""

from __future__ import annotations

import pytest
import torch
from against_float64 import DTYPES, check, random

from llamahome.kernels import lora_triton, nf4, nf4_triton
from llamahome.kernels.lora import LoraWeights, lora_linear, lora_linear_reference

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")


def _quantized(n, k, dtype=torch.bfloat16):
    return nf4.quantize((random(n, k, seed=n + k) / k**0.5).to(dtype))


def nested(weight):
    """The same weight with its largest values in 8 bits."""
    blocks = weight.absmax.numel()
    own = random(-(-blocks // 256), seed=5).abs().float()
    code, offset = torch.linspace(-1, 1, 256), torch.tensor(0.3)
    codes = (torch.arange(blocks) * 37 % 256).to(torch.uint8)
    return weight._replace(absmax=nf4.NestedAbsmax(codes, code, own, offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (7, 5), (3, 96), (64, 160), (5, 4096)])
def test_dequantize(n, k, dtype):
    for weight in (_quantized(n, k), nested(_quantized(n, k))):
        assert torch.equal(nf4.dequantize(weight, dtype), nf4.dequantize_reference(weight, dtype))


def test_dequantize_takes_a_misaligned_view():
    weight = _quantized(8, 64)
    moved = torch.cat((weight.packed[:1], weight.packed))[1:]
    assert torch.equal(nf4.dequantize(weight._replace(packed=moved)), nf4.dequantize(weight))
    empty = weight._replace(packed=weight.packed[:0], shape=(0, 64))
    assert nf4_triton.dequantize(empty.packed, weight.absmax, weight.code, (0, 64), 64, torch.bfloat16).numel() == 0


def _adapter(n, k, rank, dtype):
    return (random(rank, k, seed=2) / k**0.5).to(dtype), random(n, rank, seed=3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [lambda weight: weight, nested], ids=["fp32", "8bit"])
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "rank"), [(1, 64, 24, 4), (7, 128, 33, 8), (65, 192, 64, 16), (130, 64, 40, 64)]
)
def test_a_lora_linear_layer_on_few_rows(rows, depth, columns, rank, largest, dtype):
    """The bits of the dense weight's kernel; and against float64."""
    weight, x = largest(_quantized(columns, depth)), random(rows, depth).to(dtype)
    a, b = _adapter(columns, depth, rank, dtype)
    bias = random(columns, seed=4).to(dtype) if rank == 8 else None
    ours = lora_triton.lora_linear(x, weight, bias, a, b, 0.5)
    dense = nf4.dequantize_reference(weight, dtype)
    for value, same in zip(ours, lora_triton.lora_linear(x, dense, bias, a, b, 0.5), strict=True):
        assert torch.equal(value, same)
    results = [ours]
    for kind in (dtype, torch.float64):
        base = torch.nn.functional.linear(x.to(kind), dense.to(kind), None if bias is None else bias.to(kind))
        xa = x.to(kind) @ a.to(kind).T
        results.append([base + xa @ b.to(kind).T * 0.5, xa])
    check(*results, dtype)


def test_a_block_of_more_numbers_than_a_step():
    weight, x = nf4.quantize(random(24, 256).float(), block=128), random(3, 256, seed=1).float()
    a, b = _adapter(24, 256, 4, torch.float32)
    ours = lora_triton.lora_linear(x, weight, None, a, b, 0.5)[0]
    exact = lora_linear_reference(x, LoraWeights(nf4.dequantize_reference(weight), None, a, b, 0.5))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("depth", "fits"), [(128, True), (96, False)])
def test_a_layer_that_answers_makes_no_dense_weight_where_its_rows_are_whole_steps(depth, fits, monkeypatch):
    x, (a, b) = random(5, depth).float(), _adapter(24, depth, 4, torch.float32)
    lora = LoraWeights(_quantized(24, depth, torch.float32), None, a, b, 2.0)
    made = []
    dequantize = nf4_triton.dequantize
    monkeypatch.setattr(nf4_triton, "dequantize", lambda *given: made.append(given) or dequantize(*given))
    with torch.no_grad():
        y = lora_linear(x, lora)
    assert bool(made) != fits
    torch.testing.assert_close(y, lora_linear_reference(x, lora), rtol=1e-5, atol=1e-5)
