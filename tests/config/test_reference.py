"""What documents the settings is current, and the configurations that the project's guide shows load as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Config
from llamahome.config.reference import annotated, main, markdown, schema_text
from llamahome.config.suggest import KNOWN
from llamahome.config.yaml import read_document

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / ".config" / "training_config.yaml"

# The guide's own configuration blocks, with the values that they must give.
GUIDE: list[tuple[str, dict[str, object]]] = [
    (
        """\
# Key configuration sections
cache:          # Cache settings
data:           # Data processing
monitor:        # Progress tracking
optimization:   # Training parameters
processing:     # Compute options
resource:       # Resource management
training:       # Core training settings
""",
        {},
    ),
    (
        """\
cache:
  memory_size: 1000        # Memory cache size (MB)
  disk_size: 10000        # Disk cache size (MB)
  cleanup_interval: 3600   # Cleanup interval (seconds)
  max_age_days: 7         # Maximum cache age
""",
        {"cache.memory_size": 1000, "cache.disk_size": 10000, "cache.cleanup_interval": 3600, "cache.max_age_days": 7},
    ),
    (
        """\
data:
  batch_size: 4           # Training batch size
  max_length: 512         # Maximum sequence length
  num_workers: 4          # Data loading workers
  validation_split: 0.1   # Validation set size
""",
        {
            "data.batch_size": 4,
            "training.batch_size": 4,
            "data.max_length": 512,
            "training.max_length": 512,
            "data.num_workers": 4,
            "resource.num_workers": 4,
            "training.num_workers": 4,
            "data.validation_split": 0.1,
        },
    ),
    (
        """\
optimization:
  learning_rate: 5.0e-5   # Initial learning rate
  weight_decay: 0.01      # Weight decay
  warmup_steps: 100       # Warmup steps
  scheduler_type: cosine  # LR scheduler type
""",
        {
            "optimization.learning_rate": 5e-5,
            "optimization.weight_decay": 0.01,
            "optimization.warmup_steps": 100,
            "optimization.scheduler_type": "cosine",
        },
    ),
    (
        """\
processing:
  mixed_precision: true   # Use mixed precision
  gradient_checkpointing: true  # Use gradient checkpointing
  compile_mode: reduce-overhead # Compilation mode
""",
        {
            "processing.mixed_precision": True,
            "training.mixed_precision": True,
            "processing.gradient_checkpointing": True,
            "training.gradient_checkpointing": True,
            "processing.compile_mode": "reduce-overhead",
        },
    ),
    (
        """\
training:
  # Memory settings
  memory_limit: "90%"
  batch_size: "auto"
  gradient_accumulation: 4
  
  # Optimization
  mixed_precision: true
  gradient_checkpointing: true
  memory_efficient_attention: true
  
  # Resources
  num_workers: "auto"
  prefetch_factor: 2
  pin_memory: true
""",  # noqa: W293
        {
            "training.memory_limit": "90%",
            "data.batch_size": "auto",
            "training.accumulation_steps": 4,
            "training.gradient_accumulation": 4,
            "processing.mixed_precision": True,
            "processing.gradient_checkpointing": True,
            "training.gradient_checkpointing": True,
            "training.memory_efficient_attention": True,
            "data.num_workers": "auto",
            "resource.prefetch_factor": 2,
            "resource.pin_memory": True,
        },
    ),
    (
        """\
memory:
  # GPU settings
  gpu_memory_fraction: 0.9
  gpu_cache_size: "8GB"
  
  # CPU settings
  cpu_memory_limit: "85%"
  worker_memory: "2GB"
  
  # Cache settings
  cache_size: "10GB"
  cache_ttl: 3600
""",  # noqa: W293
        {
            "memory.gpu_memory_fraction": 0.9,
            "memory.gpu_cache_size": "8GB",
            "memory.cpu_memory_limit": "85%",
            "memory.worker_memory": "2GB",
            "memory.cache_size": "10GB",
            "memory.cache_ttl": 3600,
        },
    ),
    (
        """\
training:
  # Batch settings
  batch_size: "auto"
  accumulation_steps: 4
  
  # Optimization
  mixed_precision: true
  gradient_checkpointing: true
  memory_efficient_attention: true
  
  # Resources
  num_workers: "auto"
  prefetch_factor: 2
""",  # noqa: W293
        {
            "training.batch_size": "auto",
            "training.gradient_accumulation": 4,
            "processing.gradient_checkpointing": True,
            "training.gradient_checkpointing": True,
        },
    ),
]


def flat(config: Config) -> dict[str, Any]:
    tree = config.to_dict()
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


@pytest.mark.parametrize(("text", "values"), GUIDE)
def test_the_guides_configurations_load(load: Callable[..., Config], text: str, values: dict[str, object]) -> None:
    loaded, defaults = flat(load(text)), flat(Config.load())
    assert {name: loaded[name] for name in values} == values
    assert {name for name in loaded if loaded[name] != defaults[name]} <= set(values)


def test_the_shipped_configuration_has_the_guides_values() -> None:
    expected = flat(Config.load())
    for _, values in GUIDE:
        expected |= values
    # The guide gives two values for these; the one in its training pipeline counts.
    expected |= dict.fromkeys(["data.batch_size", "training.batch_size"], "auto")
    expected |= dict.fromkeys(["data.num_workers", "training.num_workers", "resource.num_workers"], "auto")
    assert flat(Config.load(EXAMPLE)) == expected


def test_the_shipped_configuration_names_and_explains_every_setting() -> None:
    section, named, before = "", [], ""
    for line in EXAMPLE.read_text("utf-8").splitlines():
        section = line.rstrip(":") if re.fullmatch(r"\w+:", line) else section
        if found := re.match(r"  (?:# )?([a-z_]+): ", line):
            named.append(f"{section}.{found[1]}")
            assert "; default " in before or " # same setting as " in line, line
        before = line
    assert sorted(named) == sorted(flat(Config.load()))


def test_texts_are_current() -> None:
    """`python -m llamahome.config.reference` writes them."""
    assert (ROOT / "docs" / "configuration.md").read_text("utf-8") == markdown()
    assert (ROOT / "docs" / "config.schema.json").read_text("utf-8") == schema_text()
    assert EXAMPLE.read_text("utf-8") == annotated(read_document(EXAMPLE).values)


def test_the_faults_shown_are_real_ones(faults: Callable[..., list[str]]) -> None:
    text = "optimization:\n  max_steps: 1\n  max_stepz: 3\n\n\ntraining:\n  batch_size: big\n"
    assert "\n".join(faults(text)) in markdown()


def test_writing_the_texts(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config" / "training_config.yaml").write_text("lora: {rank: 3, dropout: 1e-5}\nmodel: {name: a b}\n")
    main(tmp_path)
    config = Config.load(tmp_path / ".config" / "training_config.yaml")
    assert (config.lora.rank, config.lora.dropout, config.model.name) == (3, 1e-5, "a b")
    assert config == Config.load(overrides=["lora.rank=3", "lora.dropout=1e-5", "model.name=a b"])


def test_every_setting_is_described() -> None:
    schema = json.loads(schema_text())
    for section, keys in KNOWN.items():
        definition = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]
        assert definition["additionalProperties"] is False
        for key in keys:
            assert definition["properties"][key]["description"].endswith("."), key
            assert "default" in definition["properties"][key], key
            assert f"| `{key}` |" in markdown()
