"""A setting with several names has one value, and settings that imply each other agree."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from llamahome.config import Config, DataSettings, ProcessingSettings, TrainingSettings

Load = Callable[..., Config]
Faults = Callable[..., list[str]]


PAIRS = [
    ("data.batch_size", "training.batch_size", 2, 3),
    ("data.num_workers", "training.num_workers", 2, "auto"),
    ("resource.num_workers", "data.num_workers", 0, 1),
    ("resource.prefetch_factor", "training.prefetch_factor", 3, 4),
    ("resource.pin_memory", "training.pin_memory", False, True),
    ("training.accumulation_steps", "training.gradient_accumulation", 1, 2),
    ("training.max_length", "data.max_length", 64, 128),
    ("training.mixed_precision", "processing.mixed_precision", False, True),
    ("training.gradient_checkpointing", "processing.gradient_checkpointing", True, False),
]


@pytest.mark.parametrize(("one", "other", "value", "another"), PAIRS)
def test_two_names_are_one_setting(
    load: Load, faults: Faults, one: str, other: str, value: object, another: object
) -> None:
    def read(config: Config, name: str) -> object:
        section, key = name.split(".")
        return getattr(getattr(config, section), key)

    def line(name: str, value: object) -> str:
        section, key = name.split(".")
        return f"{section}:\n  {key}: {json.dumps(value)}\n"

    for given_name in (one, other):
        config = load(line(given_name, value))
        assert read(config, one) == read(config, other) == value
    override = load(line(one, value), [f"{other}={json.dumps(another)}"])
    assert read(override, one) == read(override, other) == another

    (first, a), (second, b) = (one.split("."), other.split("."))
    if first == second:
        text = f"{first}:\n  {a}: {json.dumps(value)}\n  {b}: {json.dumps(another)}\n"
        lines = {one: 2, other: 3}
    else:
        text = line(one, value) + line(other, another)
        lines = {one: 2, other: 4}
    (fault,) = faults(text)
    assert f"run.yaml:{lines[one]}" in fault
    assert f"run.yaml:{lines[other]}" in fault
    assert "which is the same setting; keep one of them" in fault


def test_a_conflict_in_full(faults: Faults) -> None:
    assert faults("data: {batch_size: 4}\ntraining:\n  batch_size: auto\n") == [
        'run.yaml:1: data.batch_size: got 4, but run.yaml:3 has training.batch_size: "auto", which is the same '
        "setting; keep one of them"
    ]
    assert faults("processing:\n  precision: bf16\n  mixed_precision: false\n") == [
        'run.yaml:2: processing.precision: got "bf16", but run.yaml:3 has processing.mixed_precision: false, '
        "which decides the same; keep one of them"
    ]
    assert faults("processing: {attention: sdpa}\ntraining: {memory_efficient_attention: false}\n") == [
        'run.yaml:1: processing.attention: got "sdpa", but run.yaml:2 has training.memory_efficient_attention: false, '
        "which decides the same; keep one of them"
    ]


@pytest.mark.parametrize(
    ("override", "precision", "mixed"),
    [
        ("processing.mixed_precision=false", "fp32", False),
        ("training.mixed_precision=false", "fp32", False),
        ("processing.precision=fp32", "fp32", False),
        ("processing.precision=bf16", "bf16", True),
        ("processing.precision=auto", "auto", True),
    ],
)
def test_precision_and_mixed_precision_agree(override: str, precision: str, mixed: bool) -> None:
    config = Config.load(overrides=[override])
    assert (config.processing.precision, config.processing.mixed_precision) == (precision, mixed)
    assert config.training.mixed_precision is mixed
    back = Config.from_dict(config.to_dict(), ["processing.mixed_precision=true"])
    assert (back.processing.precision, back.training.mixed_precision) == (precision if mixed else "auto", True)


@pytest.mark.parametrize("override", ["training.memory_efficient_attention=false", "processing.attention=eager"])
def test_attention_settings_agree(override: str) -> None:
    config = Config.load(overrides=[override])
    assert (config.processing.attention, config.training.memory_efficient_attention) == ("eager", False)
    assert config.with_values({"processing.attention": "sdpa"}).training.memory_efficient_attention


def test_settings_built_by_hand_agree_too() -> None:
    hand = DataSettings(batch_size=4)
    config = Config(data=hand, processing=ProcessingSettings(precision="fp32"))
    assert config.training.batch_size == 4
    assert config.training.mixed_precision is False
    assert hand == DataSettings(batch_size=4)
    with pytest.raises(ValueError, match=r"data.batch_size: 4 and training.batch_size: 2|training.batch_size: 2 and"):
        Config(data=hand, training=TrainingSettings(batch_size=2))
