"""LoRA layers whose rank-r parts are added by the Triton kernels that read the products, against float64."""

from __future__ import annotations

import pytest
import torch
from against_float64 import DTYPES, check, error, random
from torch._dynamo.backends.common import aot_autograd

from llamahome.kernels import mlp_triton, nf4, norm_lora_triton, rope_triton
from llamahome.kernels.lora import (
    TRACED_BY_RUNNING,
    Angles,
    LoraWeights,
    NormWeights,
    lora_mlp,
    lora_mlp_reference,
    lora_output_mlp,
    lora_output_mlp_reference,
    norm_lora_linears,
    norm_lora_linears_reference,
)

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")

ROWS, HIDDEN, WIDTH, SIZE = 19, 24, 40, 8


def _weights(seed, n, k, rank=4, bias=False):
    shapes = (n, k), (n,), (rank, k), (n, rank)
    weight, own, a, b = (
        random(*shape, seed=seed + i).mul(max(1, shape[-1]) ** -0.5).float() for i, shape in enumerate(shapes)
    )
    return LoraWeights(weight, own if bias else None, a if rank else None, b if rank else None, 0.5)


def _run(function, dtype, inputs, loras):
    """Outputs and the gradients of inputs and adapters, all of them rounded to fp32 or bf16 first."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    low = [
        LoraWeights(*(None if t is None else t.to(dtype) for t in lora[:2]),
                    *(None if t is None else t.to(dtype).requires_grad_() for t in lora[2:4]), lora.scaling)
        for lora in loras
    ]  # fmt: skip
    outs = function(leaves, low)
    outs = list(outs) if isinstance(outs, list | tuple) else [outs]
    given = [random(*y.shape, seed=50 + i, dtype=torch.bfloat16).to(dtype) for i, y in enumerate(outs)]
    trained = [*leaves, *(t for lora in low for t in lora[2:4] if t is not None)]
    return [*outs, *torch.autograd.grad(outs, trained, given)]


def _compare(ours, plain, dtype, inputs, loras):
    low = [x.to(dtype) for x in inputs]
    adapters = [
        lora._replace(
            **{name: t.to(dtype) for name, t in zip(lora._fields[:4], lora[:4], strict=True) if t is not None}
        )
        for lora in loras
    ]
    found, other = _run(ours, dtype, low, adapters), _run(plain, dtype, low, adapters)
    exact = _run(plain, torch.float64, low, adapters)
    if dtype == torch.float32:
        for value, near, truth in zip(found, other, exact, strict=True):
            assert error(value, truth) <= max(1e-6, 1.5 * error(near, truth))
    else:
        check(found, other, exact, dtype)


def _counted(monkeypatch, module, name):
    calls = []
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: calls.append(given) or real(*given))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank_of_v", [0, 5])
def test_rope_adds_the_updates_of_queries_and_keys(rank_of_v, dtype, monkeypatch):
    calls = _counted(monkeypatch, rope_triton, "apply_with_update")
    loras = [_weights(1, 24, HIDDEN, bias=True), _weights(5, 8, HIDDEN, 8), _weights(9, 8, HIDDEN, rank_of_v)]
    half = random(ROWS, SIZE // 2, seed=30) * 3
    cos, sin = (torch.cat((part, part), -1).to(dtype) for part in (half.cos(), half.sin()))

    def form(function):
        def call(leaves, low):
            x, weight = leaves
            angles = Angles(cos.to(x.dtype), sin.to(x.dtype), SIZE)
            return function(x, NormWeights(weight, 1e-6), low, angles)

        return call

    inputs = [random(ROWS, HIDDEN), random(HIDDEN, seed=31)]
    _compare(form(norm_lora_linears), form(norm_lora_linears_reference), dtype, inputs, loras)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_norm_and_gated_unit_add_the_updates(recompute, dtype, monkeypatch):
    joined = _counted(monkeypatch, norm_lora_triton, "forward")
    gated = _counted(monkeypatch, mlp_triton, "forward")
    loras = [
        _weights(1, HIDDEN, 16),
        _weights(5, WIDTH, HIDDEN),
        _weights(9, WIDTH, HIDDEN),
        _weights(13, HIDDEN, WIDTH),
    ]

    def form(function, **options):
        def call(leaves, low):
            mixed, residual, weight = leaves
            return function(mixed, residual, low[0], NormWeights(weight, 1e-6), low[1:3], low[3], **options)

        return call

    inputs = [random(ROWS, 16), random(ROWS, HIDDEN, seed=32), random(HIDDEN, seed=33)]
    _compare(form(lora_output_mlp, recompute=recompute), form(lora_output_mlp_reference), dtype, inputs, loras)
    assert len(joined) == 1
    assert gated[0][3] is not None


@pytest.mark.parametrize("ranks", [(4, 8), (4, 0)])
def test_gates_of_two_ranks_are_added_by_products(ranks, monkeypatch):
    gated = _counted(monkeypatch, mlp_triton, "forward")
    loras = [_weights(1 + i, WIDTH, HIDDEN, rank) for i, rank in enumerate(ranks)] + [_weights(9, HIDDEN, WIDTH)]

    def form(function):
        return lambda leaves, low: function(leaves[0], NormWeights(leaves[1], 1e-6), low[:2], low[2], residual=True)

    inputs = [random(ROWS, HIDDEN), random(HIDDEN, seed=33)]
    _compare(form(lora_mlp), form(lora_mlp_reference), torch.float32, inputs, loras)
    assert gated[0][3] is None


def test_a_compiler_sees_one_graph_in_which_operators_absorb():
    loras = [_weights(1, 24, HIDDEN), _weights(5, 8, HIDDEN), _weights(9, 8, HIDDEN), _weights(13, HIDDEN, 24)]
    loras += [_weights(17, WIDTH, HIDDEN), _weights(21, WIDTH, HIDDEN), _weights(25, HIDDEN, WIDTH)]
    loras[2] = loras[2]._replace(weight=nf4.quantize(loras[2].weight))
    for lora in loras:
        lora.a.requires_grad_(), lora.b.requires_grad_()
    half = random(ROWS, SIZE // 2, seed=30)
    cos, sin = (torch.cat((part, part), -1).float() for part in (half.cos(), half.sin()))
    norm = NormWeights(random(HIDDEN, seed=31).float(), 1e-6)
    nodes = []

    def layer(x):
        q, k, v = norm_lora_linears(x, norm, loras[:3], Angles(cos, sin, SIZE))
        return lora_output_mlp(q + k.repeat(1, 3) + v.repeat(1, 3), x, loras[3], norm, loras[4:6], loras[6])

    def noted(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    for function in TRACED_BY_RUNNING:
        torch.compiler.allow_in_graph(function)
    x = random(ROWS, HIDDEN).float().requires_grad_()
    leaves = [x, *(tensor for lora in loras for tensor in (lora.a, lora.b))]
    results = []
    for form in (
        layer,
        torch.compile(layer, backend=aot_autograd(fw_compiler=noted, bw_compiler=noted), fullgraph=True),
    ):
        y = form(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    for name in (
        "rope_lora",
        "add_rms_norm_lora",
        "gated_lora",
        "gated_backward",
        "nf4_dequantize",
        "rms_norm_backward",
    ):
        assert any(target.startswith(f"llamahome.{name}") for target in nodes), (name, sorted(set(nodes)))
