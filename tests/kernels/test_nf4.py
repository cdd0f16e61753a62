"""Weights in 4 bits are bitsandbytes' bit for bit, and LoRA layers on them equal layers on their dense weights."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llamahome.kernels import nf4
from llamahome.kernels.lora import (
    TRACED_BY_RUNNING,
    LoraWeights,
    NormWeights,
    lora_linear,
    lora_linear_reference,
    lora_mlp,
    lora_mlp_reference,
    norm_lora_linears,
    norm_lora_linears_reference,
)

T, H, F = 19, 64, 96


def quantized(n, k, *, nested=True, dtype=torch.bfloat16):
    """A weight as bitsandbytes quantizes it; None of its operators runs afterwards."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(n, k, dtype=torch.float32) / k**0.5
    packed, state = functional.quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=nested)
    return nf4.from_bitsandbytes(SimpleNamespace(data=packed, quant_state=state)), functional.dequantize_4bit(
        packed, state
    )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (576, 200), (7, 5), (40, 4096)])
def test_it_is_bitsandbytes_bit_for_bit(n, k, dtype, nested, monkeypatch):
    weight, theirs = quantized(n, k, nested=nested, dtype=dtype)
    assert torch.equal(nf4.dequantize(weight), theirs)
    assert torch.equal(nf4.dequantize_reference(weight), theirs)
    monkeypatch.setattr(nf4, "_library_is_right", lambda _: False)
    monkeypatch.setattr(nf4, "_PART", 1 << 10)
    assert torch.equal(nf4.dequantize(weight), theirs)


@pytest.mark.parametrize("k", [32, 96, 100, 160])
def test_rows_that_end_within_a_block_are_right(k):
    """bitsandbytes' own CPU kernel is not: hence it is not asked."""
    weight = torch.randn(64, k)
    dense = nf4.dequantize(nf4.quantize(weight))
    scale = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)
    widest = max(b - a for a, b in zip(nf4.NF4_CODE, nf4.NF4_CODE[1:], strict=False)) / 2
    assert ((dense - weight).abs().flatten() <= 1.001 * widest * scale.repeat_interleave(64)[: weight.numel()]).all()


def test_quantize_is_bitsandbytes_bit_for_bit():
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in ((48, 128), (5, 7)):
        weight = torch.randn(shape)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4")
        ours = nf4.quantize(weight)
        assert torch.equal(ours.packed, packed.flatten())
        assert torch.equal(ours.absmax, state.absmax.flatten())


def test_a_module_of_bitsandbytes_gives_its_weight():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    with pytest.raises(ValueError, match="not quantized yet"):
        nf4.from_bitsandbytes(module.weight)
    module.weight = module.weight._quantize("cpu")
    weight = nf4.from_bitsandbytes(module.weight)
    assert weight.packed.data_ptr() == module.weight.data_ptr()
    x = torch.randn(3, 128)
    torch.testing.assert_close(x @ nf4.dequantize(weight, torch.float32).T, module(x), rtol=1e-5, atol=1e-5)


def test_other_quantizations_are_refused():
    state = SimpleNamespace(quant_type="fp4", nested=False)
    with pytest.raises(ValueError, match="'fp4'"):
        nf4.from_bitsandbytes(SimpleNamespace(quant_state=state))
    state = SimpleNamespace(quant_type="nf4", nested=True, absmax=None, state2=SimpleNamespace(blocksize=64))
    with pytest.raises(ValueError, match="blocks of 64"):
        nf4.from_bitsandbytes(SimpleNamespace(quant_state=state))


def adapted(n, k, rank=4, *, bias=False, dropout=0.0, packed=True):
    def matrix(*shape):
        return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).requires_grad_()

    weight = quantized(n, k)[0] if packed else matrix(n, k).detach()
    return LoraWeights(weight, matrix(n) if bias else None, matrix(rank, k), matrix(n, rank), 2.0, dropout)


def results(function, inputs):
    torch.manual_seed(1)
    outs = function()
    outs = outs if isinstance(outs, list | tuple) else [outs]
    loss = sum((y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outs)
    return [*(y.detach() for y in outs), *torch.autograd.grad(loss, inputs)]


def assert_equal(function, reference, inputs):
    for found, expected in zip(results(function, inputs), results(reference, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def tensors(*groups):
    return [t for lora in groups for t in (lora.bias, lora.a, lora.b) if t is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_layers_on_packed_weights_equal_the_definition(dropout):
    """Where only some weights of a group are packed, and one has a bias, too."""
    x, residual = (torch.randn(T, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = NormWeights(torch.rand(H, dtype=torch.float64).requires_grad_(), 1e-6)
    group = [adapted(24, H, bias=True, dropout=dropout), adapted(8, H, packed=False), adapted(8, H, dropout=dropout)]
    gates, down = [adapted(F, H), adapted(F, H)], adapted(H, F, dropout=dropout)
    assert_equal(
        lambda: norm_lora_linears(x, norm, group), lambda: norm_lora_linears_reference(x, norm, group),
        [x, norm.weight, *tensors(*group)],
    )  # fmt: skip
    output = adapted(H, H)
    assert_equal(
        lambda: lora_linear(residual, output, x), lambda: x + lora_linear_reference(residual, output),
        [x, residual, *tensors(output)],
    )  # fmt: skip
    for recompute in (False, True):
        assert_equal(
            lambda: lora_mlp(x, norm, gates, down, residual=True, recompute=recompute),  # noqa: B023
            lambda: lora_mlp_reference(x, norm, gates, down, residual=True),
            [x, norm.weight, *tensors(*gates, down)],
        )


class DenseWeights(TorchDispatchMode):
    """The most weights of a size that are alive at once while operations run."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.alive, self.most = sizes, weakref.WeakSet(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() in self.sizes and out.dtype == torch.bfloat16:
            self.alive.add(out.untyped_storage())
            self.most = max(self.most, len(self.alive))
        return out


def test_one_dense_weight_at_a_time_and_none_kept():
    loras = [adapted(n, k) for n, k in ((F, H), (F, H), (H, F))]
    loras = [
        lora._replace(a=lora.a.detach().bfloat16().requires_grad_(), b=lora.b.detach().bfloat16()) for lora in loras
    ]
    x = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with (
        DenseWeights({F * H}) as dense,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        lora_mlp(x, None, loras[:2], loras[2], recompute=True).sum().backward()
    assert F * H not in saved
    assert dense.most == 1
    with DenseWeights({F * H}) as dense:
        kept = [nf4.dequantize(lora.weight) for lora in loras]
    assert dense.most == len(kept)  # it can count


def test_the_compiler_sees_through_a_packed_group():
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    group = [adapted(24, H), adapted(8, H, packed=False)]
    for function in TRACED_BY_RUNNING:
        torch.compiler.allow_in_graph(function)
    compiled = torch.compile(lambda x: norm_lora_linears(x, None, group), backend="aot_eager", fullgraph=True)
    assert_equal(lambda: compiled(x), lambda: norm_lora_linears(x, None, group), [x, *tensors(*group)])
