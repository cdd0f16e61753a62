"""Everything that a configuration can name may be handed over as an object instead; the run records what was."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from llamahome import plugins
from llamahome.config import Config
from llamahome.data.own import dataset_source, is_dataset
from llamahome.data.prepare import prepare
from llamahome.errors import ConfigError, DataError, UsageError
from llamahome.training.extensions import Extensions
from llamahome.training.run import resume, train

ROWS = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."} for i in range(24)]


class Sink:
    def __init__(self) -> None:
        self.records: list[Any] = []

    def write(self, record: Any) -> None:
        self.records.append(record)

    def event(self, event: Any) -> None: ...
    def close(self) -> None: ...


def momentum(groups: Any, settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.5)


def halving(step: int, total: int, warmup: int) -> float:
    return 0.5**step


def counted(record: Any) -> float:
    return 2.0 * record["step"]


def stop_at_two(event: str, loop: Any, record: Any) -> str | None:
    return "stop" if event == "step" and record["step"] == 2 else None


def test_objects_in_place_of_names(settings: dict[str, Any]) -> None:
    sink = Sink()
    own = Extensions(
        data=ROWS, optimizer=momentum, scheduler=halving, metrics={"counted": counted}, callbacks=[stop_at_two],
        sinks=[sink],
    )  # fmt: skip
    config = Config.load(None, {**settings, "data.path": None, "optimization.max_steps": 4})
    result = train(config, own)
    assert [record["counted"] for record in sink.records] == [2.0, 4.0]
    assert [record["learning_rate"] for record in sink.records] == [1e-3, 5e-4]
    recorded = json.loads((result.output / "run.json").read_text())["extensions"]
    assert recorded["optimizer"] == [f"{__name__}:momentum"]
    assert set(recorded) == {"data", "optimizer", "scheduler", "metrics", "callbacks", "sinks"}
    with pytest.raises(UsageError, match="resume it from Python"):
        resume(result.output)


def test_rows_of_an_object_give_the_tokens_of_the_same_file(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = Config.load(None, {"data.validation_split": 0.0})
    with prepare(path, tiny_tokenizer, config=config) as file, prepare(ROWS, tiny_tokenizer, config=config) as own:
        assert [d.tolist() for d in file.train.document(3)] == [d.tolist() for d in own.train.document(3)]
        assert own.train.num_tokens == file.train.num_tokens
    changed = [*ROWS[:-1], {"question": "Which?", "answer": "Another."}]
    with prepare(changed, tiny_tokenizer, config=config) as other:
        assert other.train.fingerprint != file.train.fingerprint


def test_rows_by_import_path_and_their_faults(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rows.py").write_text(
        "def rows():\n    for i in range(9):\n        yield {'text': f'line {i}'}\n"
        "def broken():\n    yield {'text': 'a'}\n    raise KeyError('x')\n"
    )
    monkeypatch.chdir(tmp_path)
    with prepare("own_rows:rows", tiny_tokenizer, config=Config.load(None, {"data.validation_split": 0.0})) as found:
        assert len(found.train) == 9
    with pytest.raises(DataError, match=r"own_rows:broken' failed: KeyError: 'x'; own_rows:broken:2"):
        prepare("own_rows:broken", tiny_tokenizer)
    with pytest.raises(ConfigError, match="cannot load 'own_rows:gone'"):
        prepare("own_rows:gone", tiny_tokenizer)
    with pytest.raises(DataError, match="only once"):
        dataset_source(iter(ROWS))


def test_what_is_a_data_set() -> None:
    assert is_dataset(ROWS)
    assert is_dataset(lambda: ROWS)
    assert not any(map(is_dataset, ["data.jsonl", Path("data.jsonl"), ["a.jsonl", "b.jsonl"], []]))


def test_a_package_offers_extensions_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = {
        "llamahome.optimizers": EntryPoint("half", f"{__name__}:momentum", "llamahome.optimizers"),
        "llamahome.losses": EntryPoint("mine", "operator:add", "llamahome.losses"),
        "llamahome.templates": EntryPoint("plain", "string:digits", "llamahome.templates"),
    }
    monkeypatch.setattr(plugins, "entry_points", lambda group: [offered[group]] if group in offered else [])
    assert Config.load(None, {"optimization.optimizer": "half"}).optimization.optimizer == "half"
    with pytest.raises(ConfigError, match="adamw"):
        Config.load(None, {"optimization.optimizer": "halff"})
    assert plugins.load_object("mine", key="training.loss")(2, 3) == 5
    from llamahome.data.templates import _template_source

    assert _template_source(None, "plain", "model") == "0123456789"
