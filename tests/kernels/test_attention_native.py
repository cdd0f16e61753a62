"""Attention in C++ for fp32 and bf16: as near to float64 as ATen's, the same bits for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamahome import _C
from llamahome.kernels import attention, varlen_attention, varlen_attention_reference
from llamahome.kernels.attention_native import fits_native, native_backward, native_forward

pytestmark = pytest.mark.skipif(not _C.has_avx512_bf16(), reason="needs a processor with AVX512-BF16")
BOUND = {torch.bfloat16: 4e-3, torch.float32: 2e-6}  # of an error relative to float64
both = pytest.mark.parametrize("dtype", BOUND)


def _inputs(lengths, heads, kv_heads, size, tail=0, factor=1.0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    shapes = [(sum(lengths) + tail, h, size) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(s, generator=generator).mul(factor).to(dtype) for s in shapes)
    edges = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return q, k, v, grad, edges, size**-0.5


def _exact(q, k, v, grad, edges, scale):
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = varlen_attention_reference(*leaves, edges, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def _native(q, k, v, grad, edges, scale):
    out, lse = native_forward(q, k, v, edges, scale)
    return [out, *native_backward(grad, q, k, v, out, lse, edges, scale)]


def _aten(q, k, v, grad, edges, scale, monkeypatch):
    monkeypatch.setattr(attention, "fits_native", lambda *_: False)
    out, lse = attention._forward(q, k, v, edges, scale, 0, 0.0)
    return [out, *attention._gradients(grad, q, k, v, out, lse, edges, scale, 0, 0.0)]


def _errors(found, exact):
    # One token attends to itself alone: its queries and keys have no gradient, and the error is absolute.
    return [((a.double() - b).norm() / (b.norm() or 1.0)).item() for a, b in zip(found, exact, strict=True)]


CASES = [
    ([1], 1, 1, 16), ([3, 1, 1, 40], 2, 1, 16), ([5, 6, 7, 15, 16, 17], 4, 2, 32), ([47, 48, 49, 50], 3, 1, 64),
    ([63, 64, 65, 130], 9, 3, 64), ([97, 301], 4, 4, 48), ([200], 4, 2, 80), ([129], 2, 1, 128), ([70], 2, 2, 256),
]  # fmt: skip


@both
@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "size"), CASES)
def test_it_is_as_near_to_float64_as_atens(lengths, heads, kv_heads, size, dtype, monkeypatch):
    inputs = _inputs(lengths, heads, kv_heads, size, dtype=dtype)
    exact = _exact(*inputs)
    ours, theirs = _errors(_native(*inputs), exact), _errors(_aten(*inputs, monkeypatch), exact)
    for ours_error, their_error in zip(ours, theirs, strict=True):
        assert not ours_error > max(1.2 * their_error, BOUND[dtype] / 2)
        assert not ours_error > BOUND[dtype]


@both
def test_large_scores_choose_one_key_and_overflow_nothing(dtype):
    inputs = _inputs([40, 90], 4, 2, 64, factor=40.0, dtype=dtype)
    found = _native(*inputs)
    assert all(x.isfinite().all() for x in found)
    # Scores of thousands: what fp32 keeps of their differences.
    assert _errors(found[:1], _exact(*inputs)[:1])[0] < max(BOUND[dtype], 2e-4)


@both
def test_a_number_that_is_none_stays_visible(dtype):
    q, k, v, grad, edges, scale = _inputs([20, 30], 2, 1, 16, dtype=dtype)
    q[25] = torch.nan
    out, lse = native_forward(q, k, v, edges, scale)
    assert out[25].isnan().all()
    assert out[torch.arange(50) != 25].isfinite().all()
    _, dk, _ = native_backward(grad, q, k, v, out, lse, edges, scale)
    assert dk[20:26].isnan().all()
    assert dk[:20].isfinite().all()


@both
def test_the_log_sum_exp_is_natural_and_that_of_each_head(dtype):
    q, k, v, _, edges, scale = _inputs([33, 70], 4, 2, 32, dtype=dtype)
    lse = native_forward(q, k, v, edges, scale)[1]
    for start, end in ((0, 33), (33, 103)):
        keys = k[start:end].double().repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q[start:end].double(), keys) * scale
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        expected = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(lse[:, start:end].double(), expected, rtol=1e-5, atol=2e-4)


@both
def test_the_number_of_threads_changes_no_bit(dtype):
    inputs = _inputs([90, 1, 33, 120], 6, 3, 64, tail=3, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _native(*inputs)
        torch.set_num_threads(3)
        three = _native(*inputs)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, three))
    assert not any(x[244:].any() for x in three)


@both
def test_the_operation_takes_it_where_it_fits(dtype):
    q, k, v, grad, edges, scale = _inputs([30, 50], 4, 2, 32, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for window in (0, 50):
        out = varlen_attention(*leaves, edges, scale, window)
        found = [out, *torch.autograd.grad(out, leaves, grad)]
        assert all(map(torch.equal, found, _native(q, k, v, grad, edges, scale)))
    assert not fits_native(q, k, edges, scale, 49)
    assert not fits_native(q.double(), k.double(), edges, scale, 0)
    assert not fits_native(q[..., :24], k[..., :24], edges, scale, 0)
    assert not fits_native(q, k, edges, -scale, 0)


def test_few_tasks_are_left_to_atens_many_threads(monkeypatch):
    q, k, _, _, edges, scale = _inputs([30, 50], 4, 2, 32)
    for threads, expected in ((12, True), (13, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert fits_native(q, k, edges, scale, 0) is expected


@pytest.mark.parametrize("edges", [[], [1, 4], [0, 3, 2], [0, 9], [0, -1]])
def test_boundaries_outside_the_tokens_are_refused(edges):
    q = np.zeros((8, 2, 16), np.uint16)
    lse = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="boundaries"):
        _C.attention_forward(q, q, q, np.array(edges, np.int32), 1.0, 1, q.copy(), lse)


@pytest.mark.parametrize(("place", "shape"), [(1, (7, 2, 16)), (1, (8, 3, 16)), (2, (8, 1, 16)), (6, (8, 2, 32))])
def test_arrays_that_do_not_belong_together_are_refused(place, shape):
    q = np.zeros((8, 2, 16), np.uint16)
    arguments = [q, q, q, np.array([0, 8], np.int32), 1.0, 1, q.copy(), np.zeros((2, 8), np.float32)]
    arguments[place] = np.zeros(shape, np.uint16)
    with pytest.raises(ValueError, match=r"belong together|unequal shape"):
        _C.attention_forward(*arguments)
