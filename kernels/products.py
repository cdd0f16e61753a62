"""Matrix products on a CPU where torch's own choice is not the fastest.

fp32: torch multiplies by MKL, which runs AVX2 code on processors of another maker; oneDNN runs AVX-512 wherever there
is any. On a core of a Zen 5 that is 116 against 260 GFLOP/s (896 x 576 x 1536); on a Zen 4, whose AVX-512 units are
half as wide, it was not measured.

bf16: `csrc/products_bf16.cpp` adds several products up in its accumulators and rounds once, so that an adapter's part
costs no pass of its own. It packs each weight as it goes; on two cores of a Zen 5 it is 4 to 11 % faster than oneDNN
at one product alone (680 to 940 rows), and keeps no code for each number of rows.

Which way is taken depends on the processor and the shapes alone, never on a measurement: a run that is resumed must
round as before. In other dtypes, on other processors and devices torch chooses.

Shapes: a [M, K], b [K, N], c [M, N], of one dtype; any of them may be a transposed view. Nothing is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llamahome import _C

_ONEDNN = _C.is_amd() and _C.has_avx512() and torch._C.has_mkl and torch._C._has_mkldnn
_NATIVE = _C.is_amd() and _C.has_avx512_bf16()  # another maker's may have AMX, which oneDNN uses
_SMALL = 1 << 20  # multiplications below which a call of our own costs more than it saves
_ROWS = 48  # below which packing the right factor costs more than it saves
_THIN = 64  # rows of a transposed left factor, up to which it is packed


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, maybe in column order."""
    if not _chosen(a, b):
        return a @ b
    # oneDNN is up to 4 times slower at these, but a thousand times where the turned rows have gaps.
    turned = a.t().is_contiguous() and a.shape[1] > 1 and a.shape[0] > b.shape[1]
    product: Tensor = _sum(None, [b.t()], [a.t()]).t() if turned else _sum(None, [a], [b])
    return product


def add_product_(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c + a @ b, summed before anything is rounded; may take c's memory: whoever calls it reads only the result."""
    total: Tensor = _sum(c, [a], [b]) if _chosen(a, b) else c.addmm_(a, b)
    return total


def sum_products(pairs: Sequence[tuple[Tensor, Tensor]], residual: Tensor | None = None) -> Tensor:
    """The sum of a @ b over all pairs, and of `residual` [M, N].

    What is summed by our own kernel is rounded once. Elsewhere after each product, and `residual` is added last: small
    products first, so that they are not lost on its grid.
    """
    lefts, rights = [a for a, _ in pairs], [b for _, b in pairs]
    if residual is not None and residual.dtype != lefts[0].dtype:
        return residual + sum_products(pairs)
    total: Tensor = (_sum if all(map(_chosen, lefts, rights)) else _sum_torch)(residual, lefts, rights)
    return total


def _sum_torch(start: Tensor | None, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    if start is not None and len(lefts) == 1:
        return torch.addmm(start, lefts[0], rights[0])
    total = lefts[0] @ rights[0]
    for a, b in zip(lefts[1:], rights[1:], strict=True):
        total.addmm_(a, b)
    return total if start is None else start + total


def _chosen(a: Tensor, b: Tensor) -> bool:
    if not (a.dtype == b.dtype and a.device.type == "cpu" and a.numel() > 0):
        return False
    return (_ONEDNN and a.dtype == torch.float32) or (_NATIVE and a.dtype == torch.bfloat16)


_linear: Any = torch.ops.mkldnn._linear_pointwise


def _sum_cpu(start: Tensor | None, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    if lefts[0].dtype == torch.bfloat16:
        return (_sum_native if _fits(lefts, rights) else _sum_torch)(start, lefts, rights)
    total = start
    for a, b in zip(lefts, rights, strict=True):
        if a.shape[0] * b.numel() < _SMALL:
            total = a @ b if total is None else torch.addmm(total, a, b)
        elif total is None:
            total = _linear.default(a, b.t(), None, "none", [], "")
        else:
            total = _linear.binary(a, total, b.t(), None, "add")
    assert total is not None
    return total


def _fits(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> bool:
    """Whether the kernel takes them, and is the faster."""
    m, n = lefts[0].shape[0], rights[0].shape[1]
    if n % 16 or m * n * sum(a.shape[1] for a in lefts) < _SMALL:
        return False
    if not all(b.stride(1) == 1 or _lies_in_pairs(b.t()) for b in rights):
        return False
    by_columns = m % 16 == 0 and m <= _THIN
    return all((m >= _ROWS and _lies_in_pairs(a)) or (by_columns and a.stride(0) == 1 < a.shape[1]) for a in lefts)


def _lies_in_pairs(x: Tensor) -> bool:
    return x.stride(1) == 1 and not (x.shape[1] % 2 or x.stride(0) % 2 or x.data_ptr() % 4)


def _sum_native(start: Tensor | None, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    rows, columns = lefts[0].shape[0], rights[0].shape[1]
    out = lefts[0].new_empty(rows, columns)
    before = None if start is None else start.contiguous()
    pairs = [(_place(a), _place(b), a.shape[1]) for a, b in zip(lefts, rights, strict=True)]
    address = None if before is None else before.data_ptr()
    _C.sum_products(pairs, address, out.data_ptr(), rows, columns, torch.get_num_threads())
    return out


def _place(x: Tensor) -> tuple[int, int, bool]:
    turned = x.stride(1) != 1
    return x.data_ptr(), x.stride(1 if turned else 0), turned


# An operator of our own: where torch.compile lowers oneDNN's itself, it copies transposed weights first.
torch.library.define("llamahome::sum_products", "(Tensor? start, Tensor[] lefts, Tensor[] rights) -> Tensor")
torch.library.impl("llamahome::sum_products", "cpu", _sum_cpu)
torch.library.register_fake(
    "llamahome::sum_products",
    lambda start, lefts, rights: lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1]),
)
_sum: Any = torch.ops.llamahome.sum_products.default
