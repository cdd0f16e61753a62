"""The configuration: typed settings, read from YAML and the command line."""

from __future__ import annotations

from llamahome.config.schema import (
    CacheSettings,
    DataSettings,
    DistributedSettings,
    LoraSettings,
    MemorySettings,
    ModelSettings,
    MonitorSettings,
    OptimizationSettings,
    ProcessingSettings,
    ResourceSettings,
    TrainingSettings,
)
from llamahome.config.sizes import parse_size
from llamahome.config.tree import Config

__all__ = [
    "CacheSettings",
    "Config",
    "DataSettings",
    "DistributedSettings",
    "LoraSettings",
    "MemorySettings",
    "ModelSettings",
    "MonitorSettings",
    "OptimizationSettings",
    "ProcessingSettings",
    "ResourceSettings",
    "TrainingSettings",
    "parse_size",
]
