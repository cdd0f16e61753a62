"""Matrix products in fp32 on a CPU by the faster of the two libraries that torch has.

torch multiplies fp32 by MKL, which runs AVX2 code on processors of another maker; oneDNN runs AVX-512 wherever there is
any. On a core of a Zen 5 that is 116 against 260 GFLOP/s (896 x 576 x 1536); on a Zen 4, whose AVX-512 units are half
as wide, it was not measured. Which one is asked depends on the processor alone, never on a measurement: a run that is
resumed must round as before. In other dtypes and on other devices torch chooses.

Shapes: a [M, K], b [K, N], c [M, N], of one dtype; any of them may be a transposed view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llamahome import _C

_ONEDNN = _C.is_amd() and _C.has_avx512() and torch._C.has_mkl and torch._C._has_mkldnn
_SMALL = 1 << 20  # multiplications below which oneDNN's call costs more than it saves


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, maybe in column order; not differentiable."""
    if not _runs_onednn(a, b):
        return a @ b
    # oneDNN is up to 4 times slower at these, but a thousand times where the turned rows have gaps.
    turned = a.t().is_contiguous() and a.shape[1] > 1 and a.shape[0] > b.shape[1]
    product: Tensor = _multiply(b.t(), a.t()).t() if turned else _multiply(a, b)
    return product


def add_product(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c + a @ b, summed before anything is rounded; not differentiable."""
    total: Tensor = _add_product(c, a, b) if _runs_onednn(a, b) else torch.addmm(c, a, b)
    return total


def add_product_(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`add_product` that may take c's memory: whoever calls it reads only the result."""
    total: Tensor = _add_product(c, a, b) if _runs_onednn(a, b) else c.addmm_(a, b)
    return total


def _runs_onednn(a: Tensor, b: Tensor) -> bool:
    return _ONEDNN and a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and a.numel() > 0


_linear: Any = torch.ops.mkldnn._linear_pointwise


def _multiply_cpu(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[0] * b.numel() < _SMALL:
        return a @ b
    product: Tensor = _linear.default(a, b.t(), None, "none", [], "")
    return product


def _add_product_cpu(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a.shape[0] * b.numel() < _SMALL:
        return torch.addmm(c, a, b)
    total: Tensor = _linear.binary(a, c, b.t(), None, "add")
    return total


# Operators of our own: where torch.compile lowers oneDNN's itself, it copies transposed weights first.
torch.library.define("llamahome::multiply", "(Tensor a, Tensor b) -> Tensor")
torch.library.impl("llamahome::multiply", "cpu", _multiply_cpu)
torch.library.register_fake("llamahome::multiply", lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
_multiply = torch.ops.llamahome.multiply.default

torch.library.define("llamahome::add_product", "(Tensor c, Tensor a, Tensor b) -> Tensor")
torch.library.impl("llamahome::add_product", "cpu", _add_product_cpu)
torch.library.register_fake("llamahome::add_product", lambda c, a, b: a.new_empty(a.shape[0], b.shape[1]))
_add_product = torch.ops.llamahome.add_product.default
