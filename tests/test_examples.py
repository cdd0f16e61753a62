"""Every file of examples/ runs and does what it says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamahome.config import Config

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(tmp_path: Path, data_file: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    return {
        "data.path": str(data_file),
        "model.name": str(tiny_model_dir),
        "training.output": str(tmp_path / "run"),
        "processing.precision": "fp32",
        "optimization.max_steps": 4,
        "optimization.global_batch_size": 4,
        "monitor.sinks": ["none"],
    }


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(settings: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    from llamahome.training.run import train as run

    output = run(Config.load(None, {**settings, **changes})).output
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def test_custom_loss_and_metrics(settings: dict[str, Any]) -> None:
    names = ["examples.custom_metric:trained_share", "examples.custom_metric:SmoothLoss"]
    records = train(settings, **{"training.loss": "examples.custom_loss:smoothed", "training.metrics": names})
    assert all(0 < record["trained_share"] < 1 for record in records)
    assert records[0]["SmoothLoss"] == records[0]["loss"]
    plain = train(settings, **{"training.output": str(Path(settings["training.output"]).with_name("plain"))})
    assert records[0]["loss"] > plain[0]["loss"]  # smoothing and penalty both add


def test_custom_callback(settings: dict[str, Any]) -> None:
    records = train(settings, **{"training.callbacks": ["examples.custom_callback:Diary"]})
    assert Path("diary.txt").read_text().splitlines() == ["evaluate at step 4", "checkpoint at step 4"]
    assert len(records) == 4


def test_custom_format(settings: dict[str, Any], tmp_path: Path) -> None:
    source = (EXAMPLES / "custom_format.py").read_text()
    assert "EXTENSIONS" in source
    module = load("custom_format")
    assert module.EXTENSIONS


def test_plain_loop(settings: dict[str, Any], data_file: Path, tiny_model_dir: Path) -> None:
    losses = load("plain_loop").main(str(data_file), str(tiny_model_dir))
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_governed_loop(settings: dict[str, Any], tiny_model_dir: Path) -> None:
    losses = load("governed_loop").main(str(tiny_model_dir))
    assert losses[-1] < losses[0]


def test_governed_trainer(settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = load("governed_trainer").main(str(tiny_model_dir), str(tmp_path / "out"))
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]


def test_governed_lightning(settings: dict[str, Any], tiny_model_dir: Path) -> None:
    pytest.importorskip("lightning")
    losses = load("governed_lightning").main(str(tiny_model_dir))
    assert losses[-1] < losses[0]


def test_every_example_is_tested_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = {"custom_loss", "custom_metric", "custom_callback", "custom_format", "plain_loop"}
    assert names == tested | {"governed_loop", "governed_trainer", "governed_lightning"}
