"""Compare a kernel's outputs and gradients with float64; for the `interpreted_*.py` files, loaded by conftest.py."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def check(ours, plain, exact, dtype):
    """Each result of a kernel against float64, beside the plain composition's in the same dtype."""
    for position, (value, other, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert not value.isnan().any(), position
        allowed = 1e-6 if dtype == torch.float32 else max(1.5 * error(other, truth), 2**-12)
        assert error(value, truth) <= allowed, (position, error(value, truth), allowed)


def with_gradients(function, inputs, seed=100):
    """Outputs and the gradients of all inputs for fixed random gradients of the outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [random(*y.shape, seed=seed + i, dtype=torch.bfloat16).to(y.dtype) for i, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def compare(kernel, reference, inputs, dtype):
    low = [x.to(dtype) for x in inputs]
    exact = with_gradients(reference, [x.double() for x in low])
    check(with_gradients(kernel, low), with_gradients(reference, low), exact, dtype)


def strided(x, gap=3):
    """The same numbers with a gap after every row."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + gap), float("nan"))
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]
