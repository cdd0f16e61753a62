"""The attention kernels, in Triton's interpreter, against float64; every output starts as NaN."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from llamahome.kernels import attention, attention_triton, launch, varlen_attention, varlen_attention_reference

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")


class Case(NamedTuple):
    lengths: tuple[int, ...]
    tail: int = 0
    heads: int = 2
    kv_heads: int = 1
    size: int = 16
    window: int = 0
    softcap: float = 0.0


PACKED = (37, 1, 22)
# Tiles are 32 by 32: in a sample from token 1 or 2 on, unmasked key blocks end just before or behind a row block.
LENGTHS = [
    Case((1,)), Case((1, 1, 1)), Case((1,), tail=2), Case((7,)), Case((32,)), Case((33,)), Case((97,)),
    Case((1, 70)), Case((2, 70)), Case((16, 16, 16)), Case((31, 2, 30), tail=1), Case((5, 40), tail=20),
    Case((3, 1, 3), tail=90),
]  # fmt: skip
SIZES = [Case(PACKED, tail=3, size=size) for size in (24, 32, 40, 64, 80, 96, 128)] + [Case((20, 13), size=256)]
GROUPS = [Case(PACKED, heads=h, kv_heads=k) for h, k in ((1, 1), (3, 3), (4, 2), (4, 1), (8, 1), (8, 4))]
WINDOWS = [Case((50, 1, 20), tail=5, window=window) for window in (1, 5, 16, 17, 75, 76, 2**31 - 1)]
SOFTCAPS = [
    Case(PACKED, softcap=1.5), Case(PACKED, tail=2, softcap=30.0), Case(PACKED, size=64, window=16, softcap=50.0),
]  # fmt: skip
CASES = [*LENGTHS, *SIZES, *GROUPS, *WINDOWS, *SOFTCAPS]
BROAD = [
    Case(lengths, tail, heads, kv_heads, size, window, softcap)
    for lengths, tail in (((70,), 0), ((29, 1, 34, 6), 9))
    for heads, kv_heads in ((2, 2), (4, 2), (4, 1))
    for size in (40, 64, 96)
    for window, softcap in ((0, 0.0), (16, 0.0), (5, 20.0))
]


def _name(case: Case) -> str:
    lengths = "+".join(map(str, case.lengths)) + f"~{case.tail}" * bool(case.tail)
    rest = f"-w{case.window}" * bool(case.window) + f"-cap{case.softcap:g}" * bool(case.softcap)
    return f"{lengths}-h{case.heads}/{case.kv_heads}-d{case.size}{rest}"


def _inputs(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v, the gradient of the output, boundaries. Scores are a few units, so that a soft-cap bends them."""
    generator = torch.Generator().manual_seed(len(case.lengths) + case.size)
    total = sum(case.lengths) + case.tail
    shapes = [(total, heads, case.size) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [*tensors, torch.tensor([0, *case.lengths]).cumsum(0).int()]


def _results(function, q, k, v, grad, edges, case, dtype=None) -> list[torch.Tensor]:
    """Output, dq, dk, dv, computed in `dtype`."""
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v))
    out = function(q, k, v, edges, case.size**-0.5, case.window, case.softcap)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


def _errors(results, exact, scale) -> list[float]:
    """Relative to the exact result, or to the gradient that came in where the exact result is zero."""
    norms = [b.norm() if b.norm() > 1e-9 else scale.double().norm() for b in exact]
    return [((a.double() - b).norm() / norm).item() for a, b, norm in zip(results, exact, norms, strict=True)]


def _check(case: Case, dtype: torch.dtype) -> None:
    inputs = _inputs(case, dtype)
    exact = _results(varlen_attention_reference, *inputs, case, torch.float64)
    results = _results(varlen_attention, *inputs, case)
    assert all(result.isfinite().all() for result in results)
    total = sum(case.lengths)
    assert all(not result[total:].any() for result in results), "tokens past the last boundary"
    errors = _errors(results, exact, inputs[3])
    if dtype == torch.float32:
        assert max(errors) <= 1e-6, errors
    else:
        torchs = _errors(_results(varlen_attention_reference, *inputs, case), exact, inputs[3])
        limits = [1.5 * error + 1e-6 for error in torchs]
        assert all(error <= limit for error, limit in zip(errors, limits, strict=True)), (errors, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_results_equal_float64(case, dtype):
    _check(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", BROAD, ids=_name)
def test_results_equal_float64_at_every_combination(case, dtype):
    _check(case, dtype)


@pytest.mark.parametrize("case", [Case(PACKED, tail=3), Case(PACKED, size=64, window=9)], ids=_name)
def test_half_precision(case):
    _check(case, torch.float16)


@pytest.mark.parametrize("tiles", [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize("case", [Case((50, 1, 20), tail=5), Case((71,), heads=4, window=20, softcap=9.0)], ids=_name)
def test_tiles_do_not_matter(case, tiles, monkeypatch):
    config = launch.LaunchConfig(*tiles, 4, 1)
    monkeypatch.setattr(attention_triton, "choose_config", lambda *_: config)
    _check(case, torch.float32)


def test_two_passes_for_dk_and_dv_are_one_bit_for_bit(monkeypatch):
    case = Case(PACKED, tail=2, heads=4, kv_heads=2)
    inputs = _inputs(case, torch.bfloat16)
    together = _results(varlen_attention, *inputs, case)
    split = launch.default_config("attention_dkv", "tma64", "interpreter")._replace(split=True)
    monkeypatch.setattr(attention_triton, "choose_config", lambda *_: split)
    assert all(map(torch.equal, together, _results(varlen_attention, *inputs, case)))


def test_pointers_and_descriptors_give_the_same_bits(monkeypatch):
    case = Case(PACKED, tail=3, heads=4, kv_heads=2, size=64, window=16)
    inputs = _inputs(case, torch.bfloat16)
    q, k, v, grad, _ = inputs
    assert attention_triton._by_descriptor(q, k, v, grad)
    by_descriptor = _results(varlen_attention, *inputs, case)
    monkeypatch.setattr(attention_triton, "has_tensor_descriptors", lambda _: False)
    assert not attention_triton._by_descriptor(q, k, v, grad)
    assert all(map(torch.equal, by_descriptor, _results(varlen_attention, *inputs, case)))


def _heads_outermost(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _part_of_wider_rows(x):
    return torch.cat([x, x], 1)[:, : x.shape[1]]


def _misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _size_not_dense(x):
    return x.repeat_interleave(2, 2)[:, :, ::2]


@pytest.mark.parametrize("layout", [_heads_outermost, _part_of_wider_rows, _misaligned, _size_not_dense])
@pytest.mark.parametrize("size", [40, 64])
def test_layouts_of_inputs_and_gradient_do_not_matter(layout, size):
    case = Case(PACKED, tail=3, heads=4, kv_heads=2, size=size)
    q, k, v, grad, edges = _inputs(case, torch.bfloat16)
    dense = _results(varlen_attention, q, k, v, grad, edges, case)
    strided = [layout(x) for x in (q, k, v, grad)]
    assert all(map(torch.equal, strided, (q, k, v, grad)))
    leaves = [x.requires_grad_() for x in strided[:3]]
    out = varlen_attention(*leaves, edges, size**-0.5)
    assert all(map(torch.equal, dense, [out, *torch.autograd.grad(out, leaves, strided[3])]))


def test_a_broadcast_gradient():
    case = Case(PACKED)
    q, k, v, _, edges = (x.requires_grad_() if x.is_floating_point() else x for x in _inputs(case, torch.float32))
    grads = [
        torch.autograd.grad(function(q, k, v, edges, 0.25).sum(), (q, k, v))
        for function in (varlen_attention, varlen_attention_reference)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_tokens_at_all():
    q, k, v = (torch.empty(0, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    out = varlen_attention(q, k, v, torch.tensor([0], dtype=torch.int32), 0.25)
    assert out.shape == (0, 2, 16)
    assert [x.shape[0] for x in torch.autograd.grad(out.sum(), (q, k, v))] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype):
    case = Case((50, 1, 20), tail=5, heads=4, kv_heads=1, size=64)
    inputs = _inputs(case, dtype)
    first, second = (_results(varlen_attention, *inputs, case) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("case", [Case((20, 33, 12), tail=4), Case((20, 33, 12), window=9, softcap=5.0)], ids=_name)
def test_a_changed_sample_leaves_every_bit_of_the_others(case):
    q, k, v, grad, edges = _inputs(case, torch.bfloat16)
    before = _results(varlen_attention, q, k, v, grad, edges, case)
    for x in (q, k, v, grad):
        x[20:53] = 3 - 2 * x[20:53]
    after = _results(varlen_attention, q, k, v, grad, edges, case)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:20], b[:20])
        assert torch.equal(a[53:], b[53:])
        assert not torch.equal(a[20:53], b[20:53])


@pytest.mark.parametrize("edges", [[0, 5], [0, 1, 2, 9], [0, 3, 3, 8], [0], [0, 1500, 1501, 2500]])
@pytest.mark.parametrize("tail", [0, 4])
def test_bounds_of_each_token(edges, tail):
    total = edges[-1] + tail
    start, end = attention_triton.token_bounds(torch.tensor(edges, dtype=torch.int32), total)
    expected = [(a, b) for a, b in pairwise(edges) for _ in range(a, b)]
    expected += [(total, token) for token in range(edges[-1], total)]
    assert list(zip(start.tolist(), end.tolist(), strict=True)) == expected


def test_the_operator_is_well_formed_and_compiles_without_a_break():
    case = Case((9, 4), tail=2, heads=4, kv_heads=2)
    q, k, v, grad, edges = _inputs(case, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.llamahome.varlen_attention, (*leaves, edges, 0.25, 5, 0.0))
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, *(_results(f, q, k, v, grad, edges, case) for f in (varlen_attention, compiled))))


def test_float64_takes_the_plain_path():
    case = Case((9, 4))
    inputs = _inputs(case, torch.float64)
    assert not attention._runs_triton(inputs[0])
    exact = _results(varlen_attention_reference, *inputs, case)
    assert max(_errors(_results(varlen_attention, *inputs, case), exact, inputs[3])) < 1e-12
