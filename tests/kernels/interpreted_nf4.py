"""The Triton kernels of 4-bit weights against their plain definitions."""

from __future__ import annotations

import pytest
import torch
from against_float64 import random

from llamahome.kernels import nf4, nf4_triton

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
