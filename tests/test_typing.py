"""`mypy --strict` passes on a user's code against the package as a wheel lays it out, and finds a user's mistakes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USER_CODE = """
from collections.abc import Mapping
from typing import Any, Literal

import torch

import llamahome as lh
from llamahome.aio import Worker
from llamahome.training.callbacks import Event
from llamahome.training.extensions import Extensions
from llamahome.training.loop import TrainingLoop


def loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, bias: torch.Tensor | None,
    logit_scale: float, softcap: float, reduction: str,
) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")


def stop(event: Event, loop: TrainingLoop, record: Mapping[str, Any]) -> Literal["stop"] | None:
    return "stop" if loop.state.step > 3 else None


def main(model: Any, tokenizer: Any) -> float:
    config = lh.Config.load("run.yaml", {"training.memory_limit": "8GB"})
    result = lh.train(config, Extensions(loss=loss, callbacks=[stop]))
    store: lh.TokenStore = lh.prepare("data.jsonl", tokenizer).train
    dataset = lh.StreamingDataset(store, rows="packed", length=512)
    print(lh.fuse(model).summary(), len(store), dataset.state_dict()["epoch"], result.output)
    for record in lh.TrainingLoop.__iter__(model):
        print(record["loss"])
    return lh.evaluate(model, "test.jsonl").loss


async def watch(config: lh.Config) -> list[float]:
    async with Worker() as worker:
        return [record["loss"] async for record in worker.train(config)]
"""
MISTAKES = """
import llamahome as lh

lh.StreamingDataset("data.jsonl")
lh.StreamingDataset(lh.prepare("data.jsonl", None).train, rows="padded")
lh.train(3)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the package's files where a wheel puts them, and everything else from this one."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    shutil.copytree(ROOT / "llamahome", packages / "llamahome", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", packages / "llamahome" / "kernels", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


def check(python: Path, code: str) -> str:
    file = python.parents[2] / "user.py"
    file.write_text(code)
    (file.parent / "mypy.ini").write_text("[mypy]\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, file],
        cwd=file.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_strict_user_code_passes_and_mistakes_are_found(python: Path) -> None:
    assert "Success" in check(python, USER_CODE)
    faults = check(python, MISTAKES)
    assert faults.count("error:") == 3, faults
    assert '"TokenStore"' in faults
