"""LlamaHome: fine-tune large language models within the memory you allow, exactly, on the machine you have.

The public names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamahome import errors, kernels
    from llamahome.config import Config
    from llamahome.data.batch import BatchProcessor, MicroBatch
    from llamahome.data.dataset import StepOrder, StreamingDataset
    from llamahome.data.manager import DataManager
    from llamahome.data.prepare import prepare
    from llamahome.data.store import TokenStore
    from llamahome.memory.governor import MemoryGovernor
    from llamahome.memory.monitor import MemoryMonitor
    from llamahome.memory.oom import OOMHandler
    from llamahome.memory.plan import plan_memory
    from llamahome.model.fuse import fuse
    from llamahome.monitor.metrics import MetricsCollector
    from llamahome.monitor.resources import ResourceMonitor
    from llamahome.monitor.tracker import PerformanceTracker
    from llamahome.training.evaluate import evaluate
    from llamahome.training.loop import TrainingLoop
    from llamahome.training.recovery import ResourceRecovery
    from llamahome.training.run import train

__version__ = "0.1.0"

_HOMES = {
    "BatchProcessor": "data.batch",
    "Config": "config",
    "DataManager": "data.manager",
    "MemoryGovernor": "memory.governor",
    "MemoryMonitor": "memory.monitor",
    "MetricsCollector": "monitor.metrics",
    "MicroBatch": "data.batch",
    "OOMHandler": "memory.oom",
    "PerformanceTracker": "monitor.tracker",
    "ResourceMonitor": "monitor.resources",
    "ResourceRecovery": "training.recovery",
    "StepOrder": "data.dataset",
    "StreamingDataset": "data.dataset",
    "TokenStore": "data.store",
    "TrainingLoop": "training.loop",
    "evaluate": "training.evaluate",
    "fuse": "model.fuse",
    "plan_memory": "memory.plan",
    "prepare": "data.prepare",
    "train": "training.run",
}
_MODULES = ("errors", "kernels")

__all__ = [
    "BatchProcessor",
    "Config",
    "DataManager",
    "MemoryGovernor",
    "MemoryMonitor",
    "MetricsCollector",
    "MicroBatch",
    "OOMHandler",
    "PerformanceTracker",
    "ResourceMonitor",
    "ResourceRecovery",
    "StepOrder",
    "StreamingDataset",
    "TokenStore",
    "TrainingLoop",
    "__version__",
    "errors",
    "evaluate",
    "fuse",
    "kernels",
    "plan_memory",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"llamahome.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"llamahome.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'llamahome' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
