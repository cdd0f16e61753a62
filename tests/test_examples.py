"""Every file of examples/ runs and does what it says; by default a callback and the plain loop, the others as slow."""

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
        "processing.compile_mode": "none",
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_custom_format(settings: dict[str, Any], tmp_path: Path) -> None:
    faq = tmp_path / "faq.qa"
    faq.write_text("".join(f"Q: What is {i}?\nA: A number, {i}.\n\n" for i in range(20)))
    changes = {"data.path": str(faq), "data.plugins": ["examples/custom_format.py"], "data.validation_split": 0.0}
    records = train(settings, **changes)
    assert len(records) == 4
    (fact,) = [row for row in load("custom_format").read(faq) if row["question"] == "What is 7?"]
    assert fact["answer"] == "A number, 7."


@pytest.mark.slow
def test_custom_dataset_and_template(settings: dict[str, Any], tiny_model_dir: Path) -> None:
    changes = {"data.path": "examples.custom_dataset:sums", "data.template": "examples.custom_template:PLAIN"}
    assert len(train(settings, **changes)) == 4
    from transformers import AutoTokenizer

    from llamahome.data.prepare import prepare

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    store = prepare(load("custom_dataset").sums(), tokenizer, config=Config.load(None, {
        "data.template": "examples.custom_template:PLAIN", "data.validation_split": 0.0})).train  # fmt: skip
    ids, trained = store.document(3)
    assert tokenizer.decode(ids).startswith("user: What is 3 plus 4?<|im_end|>")
    answer = [token for token, counts in zip(ids, trained, strict=True) if counts]
    assert tokenizer.decode(answer) == "7<|im_end|>"


@pytest.mark.slow
def test_custom_optimizer_and_scheduler(settings: dict[str, Any]) -> None:
    names = {"optimization.optimizer": "examples.custom_optimizer:lion", "optimization.warmup_steps": 2}
    records = train(settings, **names, **{"optimization.scheduler_type": "examples.custom_scheduler:inverse_sqrt",
                                          "optimization.learning_rate": 1e-3})  # fmt: skip
    assert records[-1]["loss"] < records[0]["loss"]
    rates = [record["learning_rate"] / 1e-3 for record in records]
    assert rates == pytest.approx([0.5, 1.0, (2 / 3) ** 0.5, 0.5**0.5])


def test_lion_is_its_definition() -> None:
    """One step from zero momentum: the sign of the gradient, and the decay."""
    import torch

    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    group = {"params": [p], "weight_decay": 0.1}
    optimizer = load("custom_optimizer").Lion([group], lr=0.5, betas=(0.9, 0.99))
    p.grad = torch.tensor([2.0, -4.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.95 - 0.5, -1.9 + 0.5, 2.85]))
    torch.testing.assert_close(optimizer.state[p]["momentum"], torch.tensor([0.02, -0.04, 0.0]))


@pytest.mark.slow
def test_accelerate_loop(settings: dict[str, Any], data_file: Path, tiny_model_dir: Path) -> None:
    losses = load("accelerate_loop").main(str(data_file), str(tiny_model_dir))
    assert len(losses) == 5
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["format", "loss", "callback", "metric", "dataset", "template", "scheduler"])
def test_an_extension_takes_under_40_lines(name: str) -> None:
    assert len((EXAMPLES / f"custom_{name}.py").read_text().splitlines()) < 40


def test_plain_loop(settings: dict[str, Any], data_file: Path, tiny_model_dir: Path) -> None:
    losses = load("plain_loop").main(str(data_file), str(tiny_model_dir))
    assert len(losses) == 5
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_governed_loop(settings: dict[str, Any], tiny_model_dir: Path) -> None:
    losses = load("governed_loop").main(str(tiny_model_dir))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_governed_trainer(settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = load("governed_trainer").main(str(tiny_model_dir), str(tmp_path / "out"))
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_governed_lightning(settings: dict[str, Any], tiny_model_dir: Path) -> None:
    pytest.importorskip("lightning")
    losses = load("governed_lightning").main(str(tiny_model_dir))
    assert losses[-1] < losses[0]


def test_every_example_is_tested_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    source = Path(__file__).read_text()
    assert all(f'load("{name}")' in source or f"examples.{name}:" in source for name in names)
