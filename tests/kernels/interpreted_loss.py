"""The Triton kernels of the loss and of small LoRA layers against float64, as `interpreted_ops.py` does it."""

from __future__ import annotations

import pytest
import torch
from against_float64 import DTYPES, check, error, random, strided

from llamahome.kernels import linear_cross_entropy, linear_cross_entropy_reference, lora_triton, loss_triton, mlp_triton
from llamahome.kernels.lora import LoraWeights, NormWeights, lora_linear, lora_mlp, lora_mlp_reference

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")

# Loss


OPTIONS = [
    {},
    {"logit_scale": 0.25},
    {"softcap": 3.0},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 5.0, "logit_scale": 2.0, "label_smoothing": 0.2, "z_loss": 0.02},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 53), (7, 1024), (9, 9000)])
def test_cross_entropy(rows, vocabulary, options, reduction, dtype):
    size = 24
    hidden, weight, bias = random(rows, size), random(vocabulary, size, seed=1) / 4, random(vocabulary, seed=2)
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    labels[1::3] = -100
    results = []
    for function, kind in (
        (linear_cross_entropy, dtype), (linear_cross_entropy_reference, dtype),
        (linear_cross_entropy_reference, torch.float64),
    ):  # fmt: skip
        inputs = [x.to(dtype).to(kind).requires_grad_() for x in (hidden, weight, bias)]
        loss = function(*inputs[:2], labels, bias=inputs[2], reduction=reduction, **options)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    check(*results, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_over_a_large_vocabulary(dtype):
    z = (random(3, 128259) * 3).to(dtype)
    labels = torch.tensor([0, 128258, 70000])
    exact = z.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), exact)
    losses = loss_triton.cross_entropy(z, labels, None, 1.0, 0.0, 0.0, 0.0, -100, True)
    assert error(losses, loss) < 1e-6
    assert error(z, grad) < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("gap", [20.0, 50.0, 80.0])
def test_a_label_that_is_all_but_certain_keeps_its_loss_and_gradient(gap):
    z = torch.tensor([[0.0, gap, 0.0]])
    loss = loss_triton.cross_entropy(z, torch.tensor([1]), None, 1.0, 0.0, 0.0, 0.0, -100, True)
    others = torch.exp(torch.tensor(-gap, dtype=torch.float64))
    torch.testing.assert_close(loss[0].double(), 2 * others, rtol=1e-5, atol=0)
    torch.testing.assert_close(z[0].double(), torch.stack([others, -2 * others, others]), rtol=1e-5, atol=0)


def test_a_hopeless_label_and_a_row_without_one():
    z = torch.tensor([[100.0, 0.0, -100.0], [5.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    kept = z.clone()
    loss = loss_triton.cross_entropy(z, torch.tensor([2, -100, 3]), None, 1.0, 0.0, 0.0, 0.0, -100, False)
    assert loss[:2].tolist() == [200.0, 0.0]
    assert loss[2].isnan()  # 3 is no column
    assert torch.equal(z, kept)
    loss_triton.cross_entropy(z, torch.tensor([2, -100, 3]), None, 1.0, 0.0, 0.0, 0.0, -100, True)
    torch.testing.assert_close(z[:2], torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]), rtol=1e-6, atol=1e-37)


def test_the_loss_alone_costs_no_gradient():
    hidden, weight = random(6, 8).float().requires_grad_(), random(50, 8, seed=1).float()
    labels = torch.arange(6)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, labels).detach())


# LoRA on few rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "rank"), [(1, 40, 24, 4), (7, 128, 33, 8), (65, 200, 64, 16), (130, 64, 40, 64)]
)
def test_a_lora_linear_layer_on_few_rows(rows, depth, columns, rank, biased, dtype):
    x, weight = random(rows, depth).to(dtype), (random(columns, depth, seed=1) / depth**0.5).to(dtype)
    a, b = (random(rank, depth, seed=2) / depth**0.5).to(dtype), random(columns, rank, seed=3).to(dtype)
    bias = random(columns, seed=4).to(dtype) if biased else None
    results = [lora_triton.lora_linear(x, weight, bias, a, b, 0.5)]
    for kind in (dtype, torch.float64):
        base = torch.nn.functional.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
        xa = x.to(kind) @ a.to(kind).T
        results.append([base + xa @ b.to(kind).T * 0.5, xa])
    check(*results, dtype)


def test_a_lora_linear_layer_takes_views():
    x, weight, a, b = (random(*shape).float() for shape in ((5, 40), (24, 40), (8, 40), (24, 8)))
    plain = lora_triton.lora_linear(x, weight, None, a, b, 0.5)
    for ours, theirs in zip(
        lora_triton.lora_linear(strided(x), weight.T.contiguous().T, None, strided(a), b.T.contiguous().T, 0.5),
        plain, strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, theirs)


def test_which_inputs_are_few_rows():
    weight = torch.zeros(4, 8)
    assert lora_triton.fits(torch.zeros(256, 8), weight)
    assert not lora_triton.fits(torch.zeros(257, 8), weight)
    assert not lora_triton.fits(torch.zeros(0, 8), weight)
    assert not lora_triton.fits(torch.zeros(4, 8, dtype=torch.float64), weight)


def test_lora_linear_takes_the_one_kernel_where_no_gradient_is_asked_for(monkeypatch):
    x, residual = random(7, 40).float(), random(7, 24, seed=5).float()
    lora = LoraWeights(*(random(*shape, seed=i).float() for i, shape in enumerate([(24, 40), (24,), (4, 40), (24, 4)])))
    rows = lora_linear(x, lora, residual)
    seen = []
    small = lora_triton.lora_linear
    monkeypatch.setattr(lora_triton, "lora_linear", lambda *given: seen.append(given) or small(*given))
    lora_linear(x, lora, residual)
    assert not seen
    with torch.no_grad():
        torch.testing.assert_close(lora_linear(x, lora, residual), rows, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ranks", [(4, 4), (4, 8)])
def test_the_mlp_lets_the_gated_unit_add_the_updates_of_gate_and_up(ranks, recompute, monkeypatch):
    rows, hidden, width = 19, 24, 40
    seeds = iter(range(1, 20))

    def weights(n, k, rank):
        a, b = (random(*shape, seed=next(seeds)).mul(k**-0.5).float() for shape in ((rank, k), (n, rank)))
        return LoraWeights(random(n, k, seed=next(seeds)).mul(k**-0.5).float(), None, a, b, 0.5)

    loras = [weights(width, hidden, ranks[0]), weights(width, hidden, ranks[1]), weights(hidden, width, 4)]
    absorbed = []
    forward = mlp_triton.forward
    monkeypatch.setattr(mlp_triton, "forward", lambda e, g, a, lora: absorbed.append(lora) or forward(e, g, a, lora))

    def run(function, dtype, **options):
        x = random(rows, hidden).float().to(dtype).requires_grad_()
        low = [
            lora._replace(
                weight=lora.weight.to(dtype),
                a=lora.a.to(dtype).requires_grad_(),
                b=lora.b.to(dtype).requires_grad_(),
            )
            for lora in loras
        ]
        norm = NormWeights(random(hidden, seed=30).float().to(dtype), 1e-6)
        y = function(x, norm, low[:2], low[2], residual=True, **options)
        inputs = [x, *(tensor for lora in low for tensor in (lora.a, lora.b))]
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    exact = run(lora_mlp_reference, torch.float64)
    for ours, truth in zip(run(lora_mlp, torch.float32, recompute=recompute), exact, strict=True):
        assert error(ours, truth) < 2e-6
    assert (absorbed[0] is not None) == (ranks[0] == ranks[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [4, 8, 16, 64, 128])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 4096, 64), (129, 576, 200), (256, 1000, 96)])
def test_lora_linear_layers_at_more_shapes(rows, depth, columns, rank, dtype):
    test_a_lora_linear_layer_on_few_rows(rows, depth, columns, rank, False, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_cross_entropy_over_llama_3s_vocabulary(options, dtype):
    test_cross_entropy(6, 128256, options, "mean", dtype)
