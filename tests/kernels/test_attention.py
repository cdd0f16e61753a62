"""Packed attention equals its plain definition, and no sample sees another."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llamahome.kernels import attention, varlen_attention, varlen_attention_reference


def _inputs(lengths, heads=4, kv_heads=2, size=16, dtype=torch.float64, tail=0):
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    total = sum(lengths) + tail
    shapes = ((total, heads, size), (total, kv_heads, size), (total, kv_heads, size))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, edges


def _with_gradients(function, q, k, v, *rest):
    out = function(q, k, v, *rest)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), (q, k, v))


@pytest.mark.parametrize("lengths", [[7], [1], [1, 1, 1], [5, 1, 33, 2], [64, 65]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_output_and_gradients_equal_the_definition(lengths, heads, kv_heads, window):
    q, k, v, edges = _inputs(lengths, heads, kv_heads)
    ours = _with_gradients(varlen_attention, q, k, v, edges, 0.3, window)
    plain = _with_gradients(varlen_attention_reference, q, k, v, edges, 0.3, window)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(2, 2, 0), (2, 1, 0), (2, 1, 4)])
def test_gradients_equal_finite_differences(heads, kv_heads, window):
    q, k, v, edges = _inputs([6, 1, 9], heads, kv_heads, size=8, tail=2)
    torch.autograd.gradcheck(lambda *x: varlen_attention(*x, edges, 0.3, window), (q, k, v))


@pytest.mark.parametrize("length", [129, 300, 513])
@pytest.mark.parametrize("window", [1, 30, 128, 200])
def test_blocks_of_a_window_equal_the_definition(length, window):
    q, k, v, edges = _inputs([5, length, 3], heads=2, kv_heads=1, size=8)
    ours = _with_gradients(varlen_attention, q, k, v, edges, 0.3, window)
    plain = _with_gradients(varlen_attention_reference, q, k, v, edges, 0.3, window)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [16, 256])
def test_a_window_bounds_the_work(window):
    length = 2048
    scores = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "flash_attention_for_cpu" in str(function):
                q, k = args[:2] if "backward" not in str(function) else args[1:3]
                scores.append(q.shape[2] * k.shape[2])
            return function(*args, **(kwargs or {}))

    q, k, v, edges = _inputs([length], heads=1, kv_heads=1, size=8, dtype=torch.float32)
    with Count():
        _with_gradients(varlen_attention, q, k, v, edges, 0.3, window)
    assert length * window <= sum(scores) <= 2 * 2 * length * max(window, 128)  # forward and backward


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_stays_near_float64(dtype, bound):
    q, k, v, edges = _inputs([40, 3, 90], dtype=dtype)
    exact = _with_gradients(
        varlen_attention_reference, *(x.detach().double().requires_grad_() for x in (q, k, v)), edges, 0.25
    )
    for a, b in zip(_with_gradients(varlen_attention, q, k, v, edges, 0.25), exact, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < bound


def test_softcap_bends_the_scores():
    q, k, v, edges = _inputs([9, 4])
    capped = varlen_attention(q, k, v, edges, 1.0, 0, 0.5)
    assert not torch.allclose(capped, varlen_attention(q, k, v, edges, 1.0))
    scores = 0.5 * torch.tanh((q[:9].transpose(0, 1) @ k[:9].repeat_interleave(2, 1).permute(1, 2, 0)) / 0.5)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:9].repeat_interleave(2, 1).transpose(0, 1)
    torch.testing.assert_close(capped[:9], expected.transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_tokens_past_the_last_boundary_give_zeros():
    q, k, v, edges = _inputs([5, 6], tail=4)
    out, *gradients = _with_gradients(varlen_attention, q, k, v, edges, 0.3)
    for tensor in (out, *gradients):
        assert tensor[11:].abs().max() == 0
        assert tensor[:11].abs().max() > 0


@pytest.mark.parametrize("function", [varlen_attention, varlen_attention_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rest", [(0, 0.0), (4, 0.0), (4, 2.0)])
def test_a_changed_sample_leaves_every_bit_of_the_others(function, dtype, rest):
    q, k, v, edges = _inputs([12, 20, 7], dtype=dtype)
    before = _with_gradients(function, q, k, v, edges, 0.25, *rest)
    changed = [x.detach().clone() for x in (q, k, v)]
    for tensor in changed:
        tensor[12:32] += 1
    after = _with_gradients(function, *(x.requires_grad_() for x in changed), edges, 0.25, *rest)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:12], b[:12])
        assert torch.equal(a[32:], b[32:])
        assert not torch.equal(a[12:32], b[12:32])


def test_inputs_need_not_be_contiguous():
    q, k, v, edges = _inputs([8, 5])
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    for a, b in zip(
        _with_gradients(varlen_attention, q, k, v, edges, 0.3),
        _with_gradients(varlen_attention, *strided, edges, 0.3),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_operator_is_well_formed():
    q, k, v, edges = _inputs([6, 3])
    torch.library.opcheck(torch.ops.llamahome.varlen_attention, (q, k, v, edges, 0.3, 0, 0.0))


def test_compile_sees_through_it():
    q, k, v, edges = _inputs([6, 3], dtype=torch.float32)
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(
        _with_gradients(compiled, q, k, v, edges, 0.3),
        _with_gradients(varlen_attention, q, k, v, edges, 0.3),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_eager_path_is_the_operator_bit_for_bit():
    q, k, v, edges = _inputs([60, 1, 33], dtype=torch.bfloat16, tail=3)
    operator = torch.ops.llamahome.varlen_attention
    eager = _with_gradients(varlen_attention, q, k, v, edges, 0.3, 9)
    dispatched = _with_gradients(lambda *args: operator(*args, 0.0)[0], q, k, v, edges, 0.3, 9)
    assert all(map(torch.equal, eager, dispatched))


def test_fake_tensors_get_shapes_and_no_data():
    q, k, v, edges = _inputs([6, 3], dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v, edges)]
        out = varlen_attention(*fake, 0.3)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        assert [x.shape for x in torch.autograd.grad(out.sum(), fake[:3])] == [q.shape, k.shape, v.shape]


def test_a_second_derivative_raises_rather_than_being_wrong():
    q, k, v, edges = _inputs([6, 3])
    (grad,) = torch.autograd.grad(varlen_attention(q, k, v, edges, 0.3).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def _varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """As torch.nn.attention.varlen.varlen_attn, which has no CPU kernel; what no sample covers stays unwritten."""
    assert (cu_seq_q is cu_seq_k, max_q, max_k, window_size, enable_gqa) == (True, len(q), len(q), (-1, 0), True)
    assert (cu_seq_q.diff() > 0).all()
    out = varlen_attention_reference(q, k, v, cu_seq_q, scale)
    return torch.cat([out[: cu_seq_q[-1]], torch.full_like(out[cu_seq_q[-1] :], torch.nan)])


@pytest.mark.parametrize("tail", [0, 5])
def test_the_librarys_attention_leaves_the_tail_zero(tail, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _varlen_attn)
    q, k, v, edges = _inputs([7, 12], tail=tail)
    library = _with_gradients(attention._library_attention, q, k, v, edges, 0.3)
    for a, b in zip(library, _with_gradients(varlen_attention_reference, q, k, v, edges, 0.3), strict=True):
        torch.testing.assert_close(a, b)
        assert not a[19:].any()


def test_the_library_is_for_nvidia_and_long_plain_samples_and_never_costs_the_same_bits(monkeypatch):
    def prefers(
        tokens=8192, samples=4, size=128, window=0, softcap=0.0, dtype=torch.bfloat16, device="cuda", trains=False
    ):
        q = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(tokens, 32, size), requires_grad=trains)
        return attention.prefers_library(q, torch.empty(samples + 1), window, softcap)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert prefers()
    refused = [{"samples": 9}, {"size": 100}, {"size": 264}, {"window": 512}, {"softcap": 30.0}]
    refused += [{"dtype": torch.float32}, {"device": "cpu"}, {"trains": True}]
    assert not any(prefers(**change) for change in refused)
    with torch.no_grad():
        assert prefers(trains=True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert prefers(trains=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not prefers()
