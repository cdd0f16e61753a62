"""A run goes on with any number of ranks from what any other number saved, and is the run that nobody stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SHARDED: dict[str, object] = {"training__method": "full", "distributed__strategy": "shard"}


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def assert_same(run: Path, expected: Path) -> None:
    assert [record["step"] for record in records(run)] == list(range(1, 13))
    for found, wanted in zip(records(run), records(expected), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5), wanted["step"]
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5), wanted["step"]
    ours, theirs = whole(run / "final"), whole(expected / "final")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-6, msg=name)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.fixture(scope="module")
def saved(place: Any, crew: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole run of so many ranks, made the first time, of which the checkpoint of step 4 is gone on from."""
    runs: dict[tuple[int, str], Path] = {}

    def run(ranks: int, method: str) -> Path:
        if (ranks, method) not in runs:
            folder = tmp_path_factory.mktemp("saved") / "run"
            crew.run(place.train(folder, **SHARDED | {"training__method": method}), ranks)
            runs[ranks, method] = folder
        return runs[ranks, method]

    return run


def goes_on(crew: Any, source: Path, folder: Path, ranks: int) -> Path:
    shutil.copytree(source, folder)
    words = ["train-resume", str(folder / "checkpoint-4")]
    crew.run(words, ranks)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_four_ranks_saved(crew: Any, saved: Any, tmp_path: Path, ranks: int) -> None:
    source = saved(4, "full")
    assert len(list((source / "checkpoint-4" / "shards").glob("shard-*.safetensors"))) == 4
    assert_same(goes_on(crew, source, tmp_path / "run", ranks), source)


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 3])
def test_four_ranks_go_on(crew: Any, saved: Any, tmp_path: Path, before: int) -> None:
    source = saved(before, "full")
    assert_same(goes_on(crew, source, tmp_path / "run", 4), source)


@pytest.mark.slow
def test_an_adapter_of_four_ranks_goes_on_alone(crew: Any, saved: Any, tmp_path: Path) -> None:
    source = saved(4, "lora")
    assert_same(goes_on(crew, source, tmp_path / "run", 1), source)


@pytest.mark.slow
def test_plain_transformers_load_what_four_ranks_export(saved: Any) -> None:
    """Each rank wrote a file of its own, and none is much larger than its share."""
    from transformers import AutoModelForCausalLM

    final = saved(4, "full") / "final"
    files = sorted(final.glob("model-*.safetensors"))
    assert len(files) > 1
    index = json.loads((final / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    model, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(
        dict(model.named_parameters())["model.norm.weight"].data, whole(final)["model.norm.weight"]
    )
