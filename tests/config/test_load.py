"""A configuration is defaults < file < overrides; every fault is reported at once, with its place and a way out."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.config import Config
from llamahome.config.suggest import KNOWN, OTHER_NAMES
from llamahome.errors import ConfigError

Load = Callable[..., Config]
Faults = Callable[..., list[str]]


def test_precedence(load: Load) -> None:
    text = "training:\n  epochs: 2\n  seed: 7\n"
    config = load(text, ["training.seed=8", "lora.rank=4", "lora.rank=8"])
    assert (config.training.epochs, config.training.seed, config.lora.rank, config.lora.alpha) == (2, 8, 8, 32)
    assert Config.load().training.epochs == 1
    assert Config.load(overrides={"training": {"epochs": 3}, "data.path": "x.jsonl"}).training.epochs == 3


def test_a_section_with_nothing_in_it_is_defaults(load: Load) -> None:
    assert load("training:\ndata:\n") == Config.load()


def test_settings_cannot_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config.load().training.epochs = 2  # type: ignore[misc]


def test_all_faults_in_the_order_of_their_lines_then_overrides(faults: Faults) -> None:
    text = "lora:\n  rank: 0\n  rnak: 3\ntraining:\n  epochs: x\ndata: {max_length: 8, batch_size: 0}\n"
    assert faults(text, ["training.max_length=1", "lora.alpha=x"]) == [
        "run.yaml:2: lora.rank: expected a whole number >= 1, got 0; the default is 16",
        "run.yaml:3: lora.rnak: unknown key; did you mean lora.rank?",
        'run.yaml:5: training.epochs: expected a whole number >= 1, got "x"; the default is 1',
        'run.yaml:6: data.batch_size: expected a whole number >= 1 or auto, got 0; the default is "auto"',
        "--set training.max_length=1: training.max_length: expected a whole number >= 2, got 1; the default is 512",
        '--set lora.alpha=x: lora.alpha: expected a whole number >= 1, got "x"; the default is 32',
    ]


def test_the_message_is_one_line_that_counts_the_faults(tmp_path: Path, load: Load) -> None:
    where = tmp_path / "run.yaml"
    with pytest.raises(ConfigError) as caught:
        load("lora: {rank: 0}\n")
    assert str(caught.value) == f"lora.rank: expected a whole number >= 1, got 0; {where}:1; the default is 16"
    with pytest.raises(ConfigError) as caught:
        load("lora: {rank: 0}\nzzzz:\n")
    assert str(caught.value).startswith(
        "2 faults in the configuration, the first is lora.rank: expected a whole number"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", "--set training.epochs: training.epochs: no value given; write section.key=value"),
        ("training.epoch=2", "--set training.epoch=2: training.epoch: unknown key; did you mean training.epochs?"),
        ("optim.lr=2", "--set optim.lr=2: optim.lr: unknown section; did you mean optimization.learning_rate?"),
        ("lr=2", "--set lr=2: lr: unknown key; did you mean optimization.learning_rate?"),
        (
            "training=2",
            "--set training=2: training: expected the section's keys, got 2; write one key per line, indented",
        ),
        ("lora.rank=[1", "--set lora.rank=[1: lora.rank: invalid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "lora.rank.x=1",
            '--set lora.rank.x=1: lora.rank: expected a whole number >= 1, got {"x": 1}; the default is 16',
        ),
    ],
)
def test_wrong_override(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load(overrides=[override])
    assert caught.value.faults == (message,)


def test_overrides_reach_into_mappings(load: Load) -> None:
    text = "data: {fields: {prompt: question}}\nmonitor: {thresholds: {memory: 0.5}}\n"
    config = load(text, ["data.fields.completion=answer", "monitor.thresholds.cpu=0.9"])
    assert config.data.fields == {"prompt": "question", "completion": "answer"}
    assert config.monitor.thresholds == {"memory": 0.5, "cpu": 0.9, "disk": None, "gpu_memory": None}


def test_only_the_command_line_lets_strangers_code_run(load: Load) -> None:
    config = load("model: {trust_remote_code: true}\n", ["model.trust_remote_code=true"])
    assert config.model.trust_remote_code
    with pytest.raises(ConfigError, match="only on the command line"):
        Config.from_dict(config.to_dict())
    assert Config.from_dict(config.to_dict(), ["model.trust_remote_code=true"]) == config
    assert config.with_values({"training.epochs": 2}).model.trust_remote_code


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["optimization.max_steps=50", "optimization.warmup_steps=100"],
         "--set optimization.warmup_steps=100: optimization.warmup_steps: the warmup of 100 steps does not end within "
         "50 steps (optimization.max_steps: 50, --set optimization.max_steps=50); lower warmup_steps"),
        (["optimization.global_batch_size=16", "training.accumulation_steps=2"],
         "--set training.accumulation_steps=2: training.accumulation_steps: has no effect, because global_batch_size "
         "is set (optimization.global_batch_size: 16, --set optimization.global_batch_size=16); remove one of them"),
        (["training.method=full", "lora.rank=8"],
         '--set lora.rank=8: lora.rank: has no effect with the method full (training.method: "full", '
         "--set training.method=full); remove it"),
        (["lora.absorb_rounding=false"],
         "--set lora.absorb_rounding=false: lora.absorb_rounding: has no effect with the method lora; "
         "remove it"),
    ],
)  # fmt: skip
def test_doubtful_combinations_are_warned_of(
    overrides: list[str], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = Config.load(overrides=overrides)
    assert caplog.messages == [warning]
    caplog.clear()
    config.with_values({"training.seed": 3})
    assert caplog.messages == []


def test_defaults_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    Config.load(overrides=["training.method=full"])
    assert caplog.messages == []


def test_stored_settings_then_a_file_then_overrides(tmp_path: Path) -> None:
    stored = Config.load(overrides=["data.batch_size=4", "lora.rank=8", "training.seed=1"]).to_dict()
    path = tmp_path / "more.yaml"
    path.write_text("training: {batch_size: 2}\nlora: {rank: 4}\n")
    config = Config.from_dict(stored, ["lora.rank=2"], path)
    assert (config.data.batch_size, config.lora.rank, config.training.seed) == (2, 2, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "expected a mapping of sections, got [1]; run.json"),
        ({"lora": {"rank": "x"}}, 'lora.rank: expected a whole number >= 1, got "x"; run.json; the default is 16'),
        ({"loar": {"key": 1}}, "loar: unknown section; run.json; did you mean lora?"),
    ],
)
def test_wrong_stored_settings(values: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_global_batch_size() -> None:
    assert Config.load().global_batch_size() == 16
    assert Config.load(overrides=["data.batch_size=2", "training.accumulation_steps=8"]).global_batch_size(3) == 48
    assert Config.load(overrides=["optimization.global_batch_size=10"]).global_batch_size(3) == 10


def test_cache_limits() -> None:
    config = Config.load()
    assert config.cache_memory_bytes == 10**9
    assert config.cache_disk_bytes == 10**10
    assert config.cache_max_age_seconds == 7 * 86400
    config = Config.load(overrides=["memory.cache_size=2GB", "memory.cache_ttl=60", "cache.memory_size=1MiB"])
    assert (config.cache_memory_bytes, config.cache_disk_bytes, config.cache_max_age_seconds) == (2**20, 2 * 10**9, 60)
    config = Config.load(overrides=["memory.cache_size=20GB", "memory.cache_ttl=1e9"])
    assert (config.cache_disk_bytes, config.cache_max_age_seconds) == (10**10, 7 * 86400)


def test_home_is_expanded(isolated_home: Path) -> None:
    assert Config.load(overrides=["cache.dir=~/c"]).cache.dir == isolated_home / "c"


def test_other_tools_names_lead_to_settings() -> None:
    known = {f"{section}.{key}" for section, keys in KNOWN.items() for key in keys}
    assert set(OTHER_NAMES.values()) <= known
    assert len(OTHER_NAMES) > 100


NUMBER = st.floats(0, 1, exclude_min=True, exclude_max=True)
SETTINGS = {
    "cache.dir": st.none() | st.just("some/folder"),
    "cache.max_age_days": NUMBER | st.integers(1, 99),
    "data.batch_size": st.just("auto") | st.integers(1, 64),
    "data.fields": st.dictionaries(st.text(), st.text(), max_size=3),
    "data.plugins": st.lists(st.text(min_size=1), max_size=3),
    "lora.target_modules": st.just("all-linear") | st.lists(st.text(min_size=1), min_size=1, max_size=3),
    "monitor.thresholds": st.dictionaries(st.sampled_from(["memory", "cpu", "disk"]), st.none() | NUMBER, max_size=3),
    "optimization.betas": st.tuples(NUMBER, NUMBER),
    "optimization.early_stopping_patience": st.none() | st.integers(1, 9),
    "optimization.warmup_steps": st.none() | NUMBER | st.integers(0, 99),
    "processing.attention": st.sampled_from(["auto", "sdpa", "xformers"]),
    "processing.precision": st.sampled_from(["auto", "bf16", "fp16"]),
    "training.memory_limit": st.sampled_from(["90%", "8GB", 10**9]),
    "training.method": st.sampled_from(["lora", "qlora", "full", "qat"]),
}


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=SETTINGS))
def test_settings_survive_json(overrides: dict[str, object]) -> None:
    config = Config.load(overrides=overrides)
    text = json.dumps(config.to_dict())
    again = Config.from_dict(json.loads(text))
    assert again == config
    assert json.dumps(again.to_dict()) == text


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
NAME = st.sampled_from([f"{section}.{key}" for section, keys in KNOWN.items() for key in keys]) | st.text(max_size=8)


@settings(deadline=None)
@given(st.dictionaries(NAME, VALUE, max_size=4))
def test_any_values_give_settings_or_one_line_per_fault(overrides: dict[str, object]) -> None:
    lines: tuple[str, ...] = ()
    try:
        Config.load(overrides=overrides)
    except ConfigError as error:
        lines = (str(error), *error.faults)
    assert all("\n" not in line for line in lines)


def test_import_is_quick_and_light() -> None:
    code = (
        "import sys, time; start = time.process_time(); import llamahome.config; "
        "print(time.process_time() - start, *{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    runs = [subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).split() for _ in range(3)]
    assert all(len(parts) == 1 for parts in runs)
    assert min(float(parts[0]) for parts in runs) < 0.25
