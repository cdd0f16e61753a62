"""Data paths to datasets."""

from __future__ import annotations

import json

import pytest

from llamahome.config import Config
from llamahome.data.manager import DataManager
from llamahome.errors import DataError


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i}."}) + "\n" for i in range(60))
    )
    return path


def test_training_and_validation_samples_come_from_one_file(data, tiny_tokenizer):
    manager = DataManager(tiny_tokenizer, Config.load(None, {"data.validation_split": 0.3}))
    datasets = manager.load(data)
    train, validation = (
        [item["input_ids"].tolist() for item in part] for part in (datasets.train, datasets.validation)
    )
    assert len(train) + len(validation) == 60
    assert datasets.prepared.report.train.samples == len(train)
    shown = [tiny_tokenizer.decode(ids) for ids in validation]
    numbers = [int(text.split("What is ")[1].split("?")[0]) for text in shown]
    assert numbers == sorted(numbers), "validation keeps its order"
    assert sorted(train) != train or len(train) < 2, "training is shuffled"


def test_ranks_share_the_samples(data, tiny_tokenizer):
    manager = DataManager(tiny_tokenizer, Config.load(None, {"data.validation_split": 0.0}))
    parts = [
        [tuple(item["input_ids"].tolist()) for item in manager.load(data, rank=rank, world_size=2).train]
        for rank in (0, 1)
    ]
    assert len(set(parts[0]) | set(parts[1])) == 60
    assert not set(parts[0]) & set(parts[1])


def test_packed_rows_have_the_configured_length(data, tiny_tokenizer):
    manager = DataManager(tiny_tokenizer, Config.load(None, {"data.max_length": 128}))
    assert max(item["input_ids"].shape[1] for item in manager.load(data, rows="packed").train) <= 128


def test_the_models_vocabulary_is_checked(data, tiny_tokenizer):
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        DataManager(tiny_tokenizer, vocab_size=3).load(data)
