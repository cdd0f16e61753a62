"""However many processes share a step, it is the same step: losses, gradient norms and weights agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

KEYS = ("loss", "grad_norm", "eval_loss")
METHODS: dict[str, dict[str, object]] = {
    "lora": {}, "full": {"training__method": "full"}, "qlora": {"training__method": "qlora"},
}  # fmt: skip
SHARED: dict[str, dict[str, object]] = {
    "replicate": {"distributed__strategy": "replicate"},
    "shard": {"distributed__strategy": "shard"},
    "hsdp": {"distributed__strategy": "shard", "distributed__replicas": 2},
}


def figures(run: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) or 0.0 for key in KEYS) for line in lines if "event" not in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same(run: Path, expected: Path) -> None:
    assert len(figures(expected)) == 12
    for step, (found, wanted) in enumerate(zip(figures(run), figures(expected), strict=True), 1):
        assert found == pytest.approx(wanted, rel=1e-5), f"step {step}"
    ours, theirs = weights(run / "final"), weights(expected / "final")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.fixture(scope="session")
def alone(place: Any, crew: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process with a method, made the first time."""
    runs: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in runs:
            runs[method] = tmp_path_factory.mktemp("alone") / method
            crew.run(place.train(runs[method], **METHODS[method]), 1)
        return runs[method]

    return run


def test_two_processes(place: Any, crew: Any, alone: Any, tmp_path: Path) -> None:
    crew.run(place.train(tmp_path / "run", **SHARED["shard"], **METHODS["full"]), 2)
    assert_same(tmp_path / "run", alone("full"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "shared", "ranks"),
    [
        ("lora", "replicate", 2), ("lora", "replicate", 4), ("lora", "shard", 4),
        ("full", "replicate", 4), ("full", "shard", 4), ("full", "hsdp", 4), ("qlora", "replicate", 2),
    ],
)  # fmt: skip
def test_any_number(place: Any, crew: Any, alone: Any, tmp_path: Path, method: str, shared: str, ranks: int) -> None:
    crew.run(place.train(tmp_path / "run", **SHARED[shared], **METHODS[method]), ranks)
    assert_same(tmp_path / "run", alone(method))
