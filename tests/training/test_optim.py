"""Decay groups and learning-rate schedules, against transformers' own."""

from __future__ import annotations

import pytest
import torch

from llamahome.config import OptimizationSettings
from llamahome.errors import ConfigError
from llamahome.training.optim import build_optimizer, build_scheduler, decay_groups, resolve_warmup


def _model():
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2, bias=False))


def test_matrices_decay_and_vectors_do_not():
    model = _model()
    model[2].weight.requires_grad_(False)
    decayed, plain = decay_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(3, 4)]
    assert decayed["weight_decay"] == 0.1
    assert sorted(tuple(p.shape) for p in plain["params"]) == [(3,), (3,), (3,)]
    assert plain["weight_decay"] == 0.0


def _rates(settings, total):
    optimizer = build_optimizer(_model(), settings)
    scheduler = build_scheduler(optimizer, settings, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_schedules_equal_those_of_transformers(name, warmup):
    from transformers import get_scheduler

    theirs_name = "constant_with_warmup" if name == "constant" else name
    settings = OptimizationSettings(scheduler_type=name, warmup_steps=warmup, learning_rate=0.5)
    optimizer = torch.optim.SGD(_model().parameters(), lr=0.5)
    theirs = get_scheduler(theirs_name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert _rates(settings, 20) == pytest.approx(expected, rel=1e-12)


def test_warmup_stable_decay_has_three_parts():
    settings = OptimizationSettings(
        scheduler_type="warmup_stable_decay", warmup_steps=4, decay_ratio=0.25, learning_rate=1.0
    )
    rates = _rates(settings, 20)
    assert rates[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert rates[4:15] == pytest.approx([1.0] * 11)
    assert rates[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_the_rate_never_falls_below_its_floor_after_the_warmup():
    settings = OptimizationSettings(warmup_steps=2, min_lr_ratio=0.1, learning_rate=1.0)
    rates = _rates(settings, 30)
    assert rates[0] == 0
    assert min(rates[2:]) >= 0.1
    assert rates[-1] < 0.11


def test_warmup_is_a_count_a_share_or_fits_a_short_run():
    assert resolve_warmup(OptimizationSettings(warmup_steps=100), 60) == 100
    assert resolve_warmup(OptimizationSettings(warmup_steps=0.25), 60) == 15
    assert resolve_warmup(OptimizationSettings(warmup_steps=0), 60) == 0
    assert resolve_warmup(OptimizationSettings(), 60) == 6
    assert resolve_warmup(OptimizationSettings(warmup_steps=None), 60) == 6
    assert resolve_warmup(OptimizationSettings(), 5000) == 100


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_every_optimizer_lowers_a_loss(name):
    torch.manual_seed(0)
    model, x = _model(), torch.randn(16, 4)
    optimizer = build_optimizer(model, OptimizationSettings(optimizer=name, learning_rate=0.01))
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_an_optimizer_of_the_users_own_gets_the_groups(tmp_path, monkeypatch):
    (tmp_path / "my_optimizer.py").write_text(
        "import torch\n"
        "def build(groups, settings):\n"
        "    return torch.optim.RMSprop(groups, lr=settings.learning_rate)\n"
    )
    monkeypatch.chdir(tmp_path)
    optimizer = build_optimizer(_model(), OptimizationSettings(optimizer="my_optimizer:build"))
    assert type(optimizer) is torch.optim.RMSprop


def test_an_optimizer_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="cannot load 'nowhere:build'") as raised:
        build_optimizer(_model(), OptimizationSettings(optimizer="nowhere:build"))
    assert raised.value.where == "optimization.optimizer"
