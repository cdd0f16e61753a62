"""Optimizers with small states: near AdamW, resumed to the same bits, and refused where they cannot run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamahome.config import OptimizationSettings
from llamahome.errors import CheckpointError, MissingError
from llamahome.memory.plan import optimizer_bytes
from llamahome.training.checkpoint import pack_optimizer, unpack_optimizer
from llamahome.training.low_bit import LOW_BIT, require_optimizer
from llamahome.training.optim import build_optimizer
from llamahome.training.update import update_weights

ON_A_CPU = [name for name, chosen in LOW_BIT.items() if not chosen.paged]
CPU = torch.device("cpu")


def model_of(seed: int = 0) -> torch.nn.Module:
    """A matrix whose moments are quantized, and a vector whose are not."""
    torch.manual_seed(seed)
    return torch.nn.Linear(128, 64)


def settings_of(name: str) -> OptimizationSettings:
    return OptimizationSettings(optimizer=name, learning_rate=1e-2)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        x = torch.randn(32, 128, generator=torch.Generator().manual_seed(number))
        (model(x) - x[:, :64]).square().mean().backward()
        update_weights(optimizer.step, optimizer)
        optimizer.zero_grad()


def trained(name: str, count: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = model_of()
    optimizer = build_optimizer(model, settings_of(name))
    steps(model, optimizer, range(count))
    return model, optimizer


@pytest.mark.parametrize("name", ON_A_CPU)
def test_it_goes_on_from_a_file_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, _ = trained(name, 8)
    half, optimizer = trained(name, 4)
    tensors, plain = pack_optimizer(half, optimizer)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    model = model_of(1)
    model.load_state_dict(half.state_dict())
    again = build_optimizer(model, settings_of(name))
    unpack_optimizer(model, again, load_file(tmp_path / "optimizer.safetensors"), plain)
    steps(model, again, range(4, 8))
    for found, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_it_is_near_adamw_with_a_state_of_the_planned_size(name: str) -> None:
    model, optimizer = trained(name, 30)
    exact, _ = trained("adamw", 30)
    start = model_of().weight
    moved = (exact.weight - start).norm()
    assert (model.weight - exact.weight).norm() < (0.5 if "4bit" in name else 0.25) * moved
    assert moved > 1
    tensors, _ = pack_optimizer(model, optimizer)
    # Without the tables of codes, which do not grow with the weights.
    state = sum(t.nbytes for key, t in tensors.items() if key.startswith("weight|") and "map" not in key)
    assert state == pytest.approx(optimizer_bytes(name) * model.weight.numel(), rel=0.15)


def test_parts_of_another_size_are_refused() -> None:
    model, optimizer = trained("torchao_adamw_4bit", 1)
    tensors, plain = pack_optimizer(model, optimizer)
    tensors["weight|exp_avg.codes"] = tensors["weight|exp_avg.codes"][:-1]
    with pytest.raises(CheckpointError, match="do not fit"):
        unpack_optimizer(model, build_optimizer(model, settings_of("torchao_adamw_4bit")), tensors, plain)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_memory_that_runs_out_in_a_step_is_no_second_step(name: str) -> None:
    """After the first weight: what has been changed must not be changed once more."""
    model, optimizer = trained(name, 2)
    before = optimizer.step

    def failing() -> Any:
        before()
        raise MemoryError

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(MemoryError):
        update_weights(failing, optimizer)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_what_runs_here_is_let_through(name: str) -> None:
    require_optimizer(name, CPU)


@pytest.mark.parametrize("name", sorted(set(LOW_BIT) - set(ON_A_CPU)))
def test_pages_need_a_gpu(name: str) -> None:
    with pytest.raises(MissingError, match=f"{name} pages its state .* on the cpu") as refused:
        require_optimizer(name, CPU)
    assert refused.value.fix == f"use {LOW_BIT[name].instead}"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="needs the package bitsandbytes"):
        require_optimizer("adamw_8bit", CPU)
    require_optimizer("adamw", CPU)
    require_optimizer("mine:optimizer", CPU)
