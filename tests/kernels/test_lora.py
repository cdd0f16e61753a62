"""Fused LoRA layers equal the plain definition and PEFT, in outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llamahome.kernels.lora import (
    TRACED_BY_RUNNING,
    Angles,
    LoraWeights,
    NormWeights,
    add_lora_mlp,
    add_lora_mlp_reference,
    lora_linear,
    lora_linear_reference,
    lora_mlp,
    lora_mlp_reference,
    lora_output_mlp,
    lora_output_mlp_reference,
    norm_lora_linears,
    norm_lora_linears_reference,
)
from llamahome.kernels.norm import rms_norm_reference

T, H, F = 37, 24, 40


def matrix(*shape, dtype=torch.float64, trained=False):
    return (torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype).requires_grad_(trained)


def weights(n, k, rank, *, bias=False, dropout=0.0, full=False):
    a, b = (matrix(rank, k, trained=True), matrix(n, rank, trained=True)) if rank else (None, None)
    return LoraWeights(matrix(n, k, trained=full), matrix(n, trained=full) if bias else None, a, b, 2.0, dropout)


def trained(*groups):
    return [t for lora in groups for t in lora[:4] if t is not None and t.requires_grad]


def results(function, inputs):
    """Outputs and the gradients of `inputs`, from one and the same random state."""
    for tensor in inputs:
        tensor.grad = None
    torch.manual_seed(1)
    outs = function()
    outs = outs if isinstance(outs, list | tuple) else [outs]
    sum((y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outs).backward()
    return [*(y.detach() for y in outs), *(tensor.grad for tensor in inputs)]


def assert_equal(function, reference, inputs, bound=1e-12):
    for found, expected in zip(results(function, inputs), results(reference, inputs), strict=True):
        assert found.dtype == expected.dtype
        assert float((found - expected).norm() / expected.norm()) < bound


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(T, H, dtype=torch.float64, requires_grad=True)


NORMS = [None, 0.0, 1.0]


def norm_of(offset):
    return None if offset is None else NormWeights(torch.rand(H, dtype=torch.float64).requires_grad_(), 1e-6, offset)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("offset", NORMS)
def test_a_group_equals_the_definition(x, offset, dropout, full):
    """Also where one projection has no adapter, one a bias, and the ranks differ."""
    norm = norm_of(offset)
    group = [
        weights(24, H, 4, bias=True, dropout=dropout, full=full), weights(8, H, 0, full=full),
        weights(8, H, 5, dropout=dropout, full=full),
    ]  # fmt: skip
    inputs = [x, *([norm.weight] if norm else []), *trained(*group)]
    assert_equal(lambda: norm_lora_linears(x, norm, group), lambda: norm_lora_linears_reference(x, norm, group), inputs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("offset", "dropout", "full"), [(None, 0.0, False), (0.0, 0.3, True), (1.0, 0.0, True)])
def test_the_mlp_equals_the_definition(x, offset, dropout, full, activation, residual, recompute):
    norm = norm_of(offset)
    gates = [weights(F, H, 4, dropout=dropout, full=full), weights(F, H, 4, bias=True, dropout=dropout, full=full)]
    down = weights(H, F, 3, dropout=dropout, full=full)
    inputs = [x, *([norm.weight] if norm else []), *trained(*gates, down)]
    assert_equal(
        lambda: lora_mlp(x, norm, gates, down, activation, residual=residual, recompute=recompute),
        lambda: lora_mlp_reference(x, norm, gates, down, activation, residual=residual), inputs,
    )  # fmt: skip


def angles_of(size=8, turned=8):
    half = torch.rand(T, turned // 2, dtype=torch.float64) * 6
    return Angles(*(torch.cat((part, part), -1) for part in (half.cos(), half.sin())), size)


@pytest.mark.parametrize("turned", [8, 4])
@pytest.mark.parametrize(("offset", "dropout"), [(None, 0.0), (0.0, 0.3), (1.0, 0.0)])
def test_a_group_with_rope_equals_the_definition(x, offset, dropout, turned):
    norm, angles = norm_of(offset), angles_of(turned=turned)
    group = [weights(24, H, 4, bias=True, dropout=dropout), weights(8, H, 5, dropout=dropout), weights(8, H, 4)]
    assert_equal(
        lambda: norm_lora_linears(x, norm, group, angles), lambda: norm_lora_linears_reference(x, norm, group, angles),
        [x, *([norm.weight] if norm else []), *trained(*group)],
    )  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("offset", "dropout", "full"), [(0.0, 0.0, False), (0.0, 0.3, True), (1.0, 0.0, True)])
def test_attentions_output_and_the_mlp_equal_the_definition(x, offset, dropout, full, recompute):
    norm, mixed = norm_of(offset), torch.randn(T, 16, dtype=torch.float64, requires_grad=True)
    output = weights(H, 16, 4, dropout=dropout, bias=full, full=full)
    gates, down = [weights(F, H, 4, dropout=dropout), weights(F, H, 3)], weights(H, F, 3, full=full)
    assert_equal(
        lambda: lora_output_mlp(mixed, x, output, norm, gates, down, recompute=recompute),
        lambda: lora_output_mlp_reference(mixed, x, output, norm, gates, down),
        [mixed, x, norm.weight, *trained(output, *gates, down)],
    )  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("offset", "dropout", "full"), [(0.0, 0.0, False), (1.0, 0.3, True)])
def test_the_sum_of_two_branches_and_the_mlp_equal_the_definition(x, offset, dropout, full, recompute):
    norm, other = norm_of(offset), torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    gates, down = [weights(F, H, 4, dropout=dropout), weights(F, H, 4)], weights(H, F, 3, full=full)
    assert_equal(
        lambda: add_lora_mlp(other, x, norm, gates, down, recompute=recompute),
        lambda: add_lora_mlp_reference(other, x, norm, gates, down),
        [other, x, norm.weight, *trained(*gates, down)],
    )  # fmt: skip


def test_only_attentions_output_is_trained():
    """Its gradient goes through the MLP even if nothing else there wants one."""
    mixed, x, norm = torch.randn(T, 16, dtype=torch.float64), torch.randn(T, H, dtype=torch.float64), norm_of(0.0)
    norm = norm._replace(weight=norm.weight.detach())
    output, gates, down = weights(H, 16, 4), [weights(F, H, 0), weights(F, H, 0)], weights(H, F, 0)
    assert_equal(
        lambda: lora_output_mlp(mixed, x, output, norm, gates, down),
        lambda: lora_output_mlp_reference(mixed, x, output, norm, gates, down), trained(output),
    )  # fmt: skip


def test_gate_and_up_in_one_matrix(x):
    norm, both, down = norm_of(0.0), weights(2 * F, H, 4), weights(H, F, 4)
    assert_equal(
        lambda: lora_mlp(x, norm, [both], down), lambda: lora_mlp_reference(x, norm, [both], down),
        [x, norm.weight, *trained(both, down)],
    )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_one_layer_with_a_residual(x, bias):
    lora, residual = weights(H, H, 4, bias=bias), torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    assert_equal(
        lambda: lora_linear(x, lora, residual), lambda: residual + lora_linear_reference(x, lora),
        [x, residual, *trained(lora)],
    )  # fmt: skip


def test_frozen_layers_need_no_gradient_of_their_input():
    """Below the first adapter nothing is computed: an input without gradient gets none."""
    frozen, lora = torch.randn(T, H, dtype=torch.float64), weights(8, H, 4)
    norm_lora_linears(frozen, None, [lora])[0].sum().backward()
    assert lora.a.grad is not None
    assert frozen.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_peft_gives_the_same_loss_and_adapter_gradients(dropout):
    """A Llama MLP and a q, k, v group of PEFT's own modules in float64; the same seed draws the same dropout masks."""
    from peft import LoraConfig, inject_adapter_in_model

    from llamahome.model.fuse import projection

    sizes = {"q": (H, H), "k": (H, 8), "v": (H, 8), "gate": (H, F), "up": (H, F), "down": (F, H)}
    model = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}).double()
    config = LoraConfig(r=4, lora_alpha=7, lora_dropout=dropout, target_modules=list(sizes), init_lora_weights=False)
    model = inject_adapter_in_model(config, model).double().train()
    norm = NormWeights(torch.rand(H, dtype=torch.float64), 1e-5)
    x = torch.randn(T, H, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def theirs():
        y = rms_norm_reference(x, *norm)
        outs = [model[name](y) for name in ("q", "k", "v")]
        h = nn.functional.silu(model["gate"](y)) * model["up"](y)
        return [*outs, model["down"](h)]

    def ours():
        found = {name: projection(model[name]) for name in sizes}
        outs = norm_lora_linears(x, norm, [found["q"], found["k"], found["v"]])
        return [*outs, lora_mlp(x, norm, [found["gate"], found["up"]], found["down"])]

    assert len(parameters) == 12
    assert_equal(ours, theirs, parameters)


def test_bf16_stays_as_near_to_float64_as_plain_pytorch(x):
    """Adapters in fp32 on bf16 weights under autocast, as in training; gradients come in the adapters' own type."""
    norm = norm_of(0.0)
    gates, down = [weights(F, H, 4), weights(F, H, 4)], weights(H, F, 4)
    exact = results(lambda: lora_mlp_reference(x, norm, gates, down), [x, *trained(*gates, down)])
    low = lambda t, kind: t.detach().to(kind).requires_grad_(t.requires_grad)  # noqa: E731
    x16, norm16 = low(x, torch.bfloat16), NormWeights(low(norm.weight, torch.bfloat16).detach(), norm.eps)
    mixed = [
        LoraWeights(low(w, torch.bfloat16), None, low(a, torch.float32), low(b, torch.float32), s)
        for w, _, a, b, s, _ in (*gates, down)
    ]
    errors = {}
    for function in (lora_mlp, lora_mlp_reference):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found = results(lambda: function(x16, norm16, mixed[:2], mixed[2]), [x16, *trained(*mixed)])  # noqa: B023
        assert [t.dtype for t in found[2:]] == [torch.float32] * 6
        errors[function] = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
    assert all(ours < 1.5 * theirs for ours, theirs in zip(errors[lora_mlp], errors[lora_mlp_reference], strict=True))


def test_a_second_derivative_is_refused(x):
    lora = weights(H, H, 4)
    (gradient,) = torch.autograd.grad(lora_linear(x, lora).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_compiler_sees_through_them(x):
    norm, group = norm_of(0.0), [weights(24, H, 4), weights(8, H, 4)]
    gates, down = [weights(F, H, 4), weights(F, H, 4)], weights(H, F, 4)

    def layer(x):
        q, k = norm_lora_linears(x, norm, group)
        return lora_mlp(lora_linear(q + k.repeat(1, 3), group[0], x), norm, gates, down, residual=True)

    for function in TRACED_BY_RUNNING:
        torch.compiler.allow_in_graph(function)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_equal(lambda: compiled(x), lambda: layer(x), [x, norm.weight, *trained(*group, *gates, down)])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_an_update_below_the_last_digit_of_the_outputs_is_not_lost(residual: bool, bias: bool) -> None:
    """As it is after a first step of AdamW at a rate of 2e-4: added to products in bf16 a third of it would arrive."""
    rows, h, rank = 512, 256, 16
    low = torch.bfloat16
    lora = LoraWeights(
        matrix(h, h, dtype=low), matrix(h, dtype=low) if bias else None, matrix(rank, h, dtype=low),
        (2e-4 * torch.randn(h, rank).sign()).to(low), 2.0,
    )  # fmt: skip
    x = torch.randn(rows, h, dtype=torch.float64).to(low)
    rest = torch.randn(rows, h, dtype=torch.float64).to(low) if residual else None
    without = LoraWeights(lora.weight, lora.bias, lora.a, torch.zeros_like(lora.b), 2.0)
    change = lora_linear(x, lora, rest).double() - lora_linear(x, without, rest).double()
    exact = 2.0 * x.double() @ lora.a.double().T @ lora.b.double().T
    assert float((change * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.1)
    plain = lora_linear_reference(x, lora).double() - lora_linear_reference(x, without).double()
    assert float((plain * exact).sum() / exact.square().sum()) < 0.8


def test_the_adapters_part_of_an_inputs_gradient_is_not_lost() -> None:
    rows, h, rank = 512, 256, 16
    low = torch.bfloat16
    lora = LoraWeights(matrix(h, h, dtype=low), None, matrix(rank, h, dtype=low), None, 2.0)
    d_out, b = torch.randn(rows, h, dtype=torch.float64).to(low), (2e-4 * torch.randn(h, rank).sign()).to(low)
    grads = []
    for up in (b, torch.zeros_like(b)):
        x = torch.zeros(rows, h, dtype=low, requires_grad=True)
        lora_linear(x, lora._replace(b=up)).backward(d_out)
        grads.append(x.grad.double())
    exact = 2.0 * d_out.double() @ b.double() @ lora.a.double()
    assert float(((grads[0] - grads[1]) * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.1)
