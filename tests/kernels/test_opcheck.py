"""Every registered operator keeps PyTorch's rules: schema, fake results, autograd, and under a compiler's tracing."""

from __future__ import annotations

import pytest
import torch

from llamahome.kernels import loss, mlp, nf4, norm, rope  # noqa: F401, they register the operators

OPS = torch.ops.llamahome


def _random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


def _trained(*shape):
    return _random(*shape).requires_grad_()


def _cases():
    rows, weight, rstd = (5, 8), (8,), (5,)
    yield "rms_norm", (_trained(*rows), _trained(*weight), 1e-5, 0.0)
    yield "rms_norm", (_random(*rows, dtype=torch.bfloat16), _random(*weight), 1e-5, 0.0)
    yield "add_rms_norm", (_trained(*rows), _trained(*rows), _trained(*weight), 1e-5, 1.0)
    yield "rms_norm_apply", (_random(*rows), _random(*weight), _random(*rstd), 1.0)
    for need_weight, d_residual in ((True, _random(*rows)), (False, None)):
        inputs = (_random(*rows), _random(*rows), _random(*weight), _random(*rstd))
        yield "rms_norm_backward", (*inputs, 0.0, need_weight, d_residual)
    for inverse in (False, True):
        yield "rope", (_trained(5, 2, 8), _random(5, 4).repeat(1, 2), _random(5, 4).repeat(1, 2), inverse)
    yield "rope_lora", (_random(5, 2, 8), *[_random(5, 4).repeat(1, 2)] * 2, False, _random(5, 4), _random(16, 4), 0.5)
    yield "add_rms_norm_lora", (*[_random(*rows)] * 2, _random(*weight), 1e-5, 0.0, _random(5, 4), _random(8, 4), 0.5)
    yield "gated", (_trained(*rows), _trained(*rows), "silu")
    update = (_random(5, 4), _random(8, 4), _random(5, 4), _random(8, 4), 0.5, 2.0)
    yield "gated_lora", (_random(*rows), _random(*rows), "gelu_tanh", *update)
    yield "gated_backward", (*[_random(*rows)] * 3, "silu", *update)
    yield "gated_backward", (*[_random(*rows)] * 3, "silu", None, None, None, None, 0.0, 0.0)
    weight = nf4.quantize(_random(5, 8))
    yield "nf4_dequantize", (weight.packed, weight.absmax, weight.code, 5, 8, 64, torch.bfloat16)
    labels, form = torch.tensor([3, -100, 0, 1, 2]), (1.0, 0.0, 0.1, 0.01)
    for trained in (True, False):
        inputs = [x.requires_grad_(trained) for x in (_random(*rows), _random(7, 8), _random(7))]
        factor = torch.tensor(0.625) if trained else None
        yield "linear_cross_entropy", (*inputs, labels, factor, *form, *[trained] * 3, 2, torch.float32)


@pytest.mark.parametrize(
    ("name", "arguments"), [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(_cases())]
)
def test_the_operator_keeps_the_rules(name, arguments):
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_every_operator_of_these_files_is_checked():
    checked = {name for name, _ in _cases()}
    prefixes = ("rms_norm", "add_rms_norm", "rope", "gated", "nf4", "linear_cross_entropy")
    registered = {
        schema.name.removeprefix("llamahome::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(tuple(f"llamahome::{prefix}" for prefix in prefixes))
    }
    assert registered == checked
