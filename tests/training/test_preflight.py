"""Before the first step: what would fail later fails now, with its exit code, and the steps stay as they were."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamahome.config import Config
from llamahome.errors import MemoryLimitError, StorageError, UsageError
from llamahome.training import preflight as module
from llamahome.training.checkpoint import fault_of, save_checkpoint, write_manifest
from llamahome.training.preflight import dry_run
from llamahome.training.run import train

Settings = dict[str, Any]


def config(settings: Settings, **changes: object) -> Config:
    return Config.load(None, {**settings, **changes})


def damaged(change: Callable[[Path], None]) -> Callable[..., Path]:
    """A disk that keeps something else than what a checkpoint was given, and knows nothing of it."""

    def save(run: Path, state: Any, *parts: Any) -> Path:
        path = save_checkpoint(run, state, *parts)
        change(path)
        (path / "manifest.json").unlink()  # the new one lists what is there
        write_manifest(path, state.step)
        return path

    return save


def flip_lowest_bit(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors.values())).view(torch.int32)
    first[0, 0] ^= 1
    save_file(tensors, file)


def forget_the_seed(path: Path) -> None:
    file = path / "training_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 7}))


def test_a_run_records_what_was_tried(settings: Settings) -> None:
    output = train(config(settings)).output
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = next(event for event in events if event.get("event") == "preflight")
    size = sum(file.stat().st_size for file in (output / "checkpoint-12").iterdir())
    assert 0 < found["checkpoint_bytes"] < size  # of the optimizer's state there was none yet
    kept = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    assert found["disk_bytes"] > kept
    assert found["longest_tokens"] > 0
    assert found["seconds_left"] > 0
    assert not list(output.glob(".preflight*"))


def test_the_steps_have_the_bits_they_have_without(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dropout = {"lora.dropout": 0.1, "optimization.max_steps": 4}
    with_it = train(config(settings, **dropout)).output
    monkeypatch.setattr("llamahome.training.run.preflight", lambda *_: iter(()))
    without = train(config(settings, **dropout, **{"training.output": str(tmp_path / "without")})).output
    one, other = (load_file(path / "final" / "adapter_model.safetensors") for path in (with_it, without))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("change", "named"), [(flip_lowest_bit, "lora_A"), (forget_the_seed, "training_state.json")])
def test_a_checkpoint_that_comes_back_otherwise_ends_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], named: str
) -> None:
    monkeypatch.setattr(module.checkpoints, "save_checkpoint", damaged(change))
    with pytest.raises(StorageError, match=f"not read back as it was saved: .*{named}"):
        train(config(settings))
    output = Path(settings["training.output"])
    assert json.loads((output / "status.json").read_text())["code"] == 6
    assert not list(output.glob(".preflight*"))


def test_full_weights_are_compared_too(settings: Settings) -> None:
    found = dry_run(config(settings, **{"training.method": "full"}))
    assert found["checkpoint_bytes"] > 4 * 50_000


def test_a_disk_that_is_too_small_is_named_before_the_first_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = dry_run(config(settings))["disk_bytes"]
    free = needed + 10**9 - 1  # resource.min_free_disk is 1 GB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(StorageError, match=" free, ") as fault:
        train(config(settings))
    assert fault.value.where == settings["training.output"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free + 1))
    dry_run(config(settings, **{"training.output": settings["training.output"] + "-2"}))


def test_a_longest_sample_that_does_not_fit_is_named_by_its_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(module, "try_micro_batch", lambda *_: failure)
    with pytest.raises(MemoryLimitError, match="out of memory with the longest sample alone") as fault:
        dry_run(config(settings))
    assert fault.value.where.startswith(f"{settings['data.path']}:")


def test_a_lack_of_memory_that_passes_ends_no_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([RuntimeError("DefaultCPUAllocator: can't allocate memory")])
    monkeypatch.setattr(module, "try_micro_batch", lambda *_: next(failures, None))
    assert dry_run(config(settings))["longest_tokens"] > 0


def test_a_micro_batch_that_does_not_fit_makes_the_cut_smaller(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(module, "try_micro_batch", lambda _, ids: full if len(ids) > 1 else None)
    output = train(config(settings)).output
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events if "event" in event]
    assert names[names.index("oom") + 1] == "cut_changed"
    assert names.index("cut_changed") < names.index("preflight")


@pytest.mark.parametrize("before", [(), ("deep",), ("deep", "run")])
def test_a_dry_run_leaves_the_disk_as_it_was(settings: Settings, tmp_path: Path, before: tuple[str, ...]) -> None:
    output = tmp_path / "deep" / "run"
    tmp_path.joinpath(*before).mkdir(parents=True, exist_ok=True)
    there = {path for path in tmp_path.rglob("*") if "home" not in path.parts}
    found = dry_run(config(settings, **{"training.output": str(output)}))
    assert {path for path in tmp_path.rglob("*") if "home" not in path.parts} == there
    assert found["event"] == "preflight"


def test_a_dry_run_refuses_what_a_run_would(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="already holds files"):
        dry_run(config(settings, **{"training.output": str(output)}))
    assert os.listdir(output) == ["letter.txt"]


def test_a_checkpoint_of_the_preflight_is_like_any_other(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = []
    monkeypatch.setattr(module, "_difference", lambda path, _: faults.append(fault_of(path)))
    dry_run(config(settings))
    assert faults == [None]
