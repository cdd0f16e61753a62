"""`Config`: all sections together, and what follows from one setting for another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

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
    QatSettings,
    ResourceSettings,
    Section,
    TrainingSettings,
)
from llamahome.config.sizes import parse_size

Key = tuple[str, str]  # section and key

# One setting under several names; the first is the one that the documentation explains.
ALIASES: tuple[tuple[Key, ...], ...] = (
    (("training", "batch_size"), ("data", "batch_size")),
    (("training", "num_workers"), ("data", "num_workers"), ("resource", "num_workers")),
    (("training", "prefetch_factor"), ("resource", "prefetch_factor")),
    (("training", "pin_memory"), ("resource", "pin_memory")),
    (("training", "gradient_accumulation"), ("training", "accumulation_steps")),
    (("data", "max_length"), ("training", "max_length")),
    (("processing", "mixed_precision"), ("training", "mixed_precision")),
    (("processing", "gradient_checkpointing"), ("training", "gradient_checkpointing")),
)
_PRECISION: Key = ("processing", "precision")
_MIXED: Key = ("processing", "mixed_precision")
_ATTENTION: Key = ("processing", "attention")
_EFFICIENT: Key = ("training", "memory_efficient_attention")
AUTO_SAMPLES = 4  # samples of a micro-batch that `batch_size: auto` stands for in the global batch size


def same_setting(key: Key) -> tuple[Key, ...]:
    """Return all names of a setting, `key` itself included."""
    return next((names for names in ALIASES if key in names), (key,))


def disagree(given: Mapping[Key, object]) -> list[tuple[Key, Key, str]]:
    """Return the pairs of keys in `given` whose values cannot hold together, and how they are related."""
    pairs = [
        (first, second, "is the same setting")
        for names in ALIASES
        for first, second in combinations(names, 2)
        if first in given and second in given and given[first] != given[second]
    ]
    pairs += [
        (mixed, _PRECISION, "decides the same")
        for mixed in same_setting(_MIXED)
        if (given.get(mixed), given.get(_PRECISION)) in ((False, "bf16"), (False, "fp16"), (True, "fp32"))
    ]
    efficient, attention = given.get(_EFFICIENT), given.get(_ATTENTION, "auto")
    if (efficient is True and attention == "eager") or (efficient is False and attention not in ("auto", "eager")):
        pairs.append((_EFFICIENT, _ATTENTION, "decides the same"))
    return pairs


class Config(Section):
    """The settings of a run. Build it with `Config.load`; equal settings under two names always hold one value."""

    cache: CacheSettings = Field(default_factory=CacheSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    monitor: MonitorSettings = Field(default_factory=MonitorSettings)
    optimization: OptimizationSettings = Field(default_factory=OptimizationSettings)
    processing: ProcessingSettings = Field(default_factory=ProcessingSettings)
    resource: ResourceSettings = Field(default_factory=ResourceSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    memory: MemorySettings = Field(default_factory=MemorySettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    qat: QatSettings = Field(default_factory=QatSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    distributed: DistributedSettings = Field(default_factory=DistributedSettings)

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Mapping[str, object] | Sequence[str] = ()) -> Config:
        """Read defaults < the file at `path` < `overrides`, and check everything.

        `overrides` is `{"training.epochs": 2}`, or `["training.epochs=2"]` with values written as in YAML. Raises
        ConfigError, whose `faults` holds a line `file:line: key: rule, value; fix` for each fault found.
        """
        from llamahome.config.load import load  # that module builds Configs

        return load({}, path, overrides)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, object],
        overrides: Mapping[str, object] | Sequence[str] = (),
        path: str | Path | None = None,
        *,
        source: str = "run.json",
    ) -> Config:
        """Rebuild what `to_dict` gave, then a file and overrides over it; `source` names `values` in messages.

        Settings that only the command line may turn on are refused in `values`, for they may come from a stranger:
        give them as overrides again.
        """
        from llamahome.config.load import load  # that module builds Configs

        return load(values, path, overrides, source)

    def with_values(self, overrides: Mapping[str, object]) -> Config:
        """Return a copy with some settings changed, each checked by itself as in `load`."""
        from llamahome.config.load import change  # that module builds Configs

        return change(self, overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON-able values."""
        return self.model_dump(mode="json")

    @property
    def trains_base(self) -> bool:
        """Whether the base model's own weights are trained, and no adapter."""
        return self.training.method == "full" or (self.training.method == "qat" and not self.qat.lora)

    def global_batch_size(self, world_size: int = 1) -> int:
        """Return the samples of an optimizer step; `batch_size: auto` counts as 4 and only changes the cut."""
        if self.optimization.global_batch_size is not None:
            return self.optimization.global_batch_size
        batch = self.training.batch_size
        samples = AUTO_SAMPLES if batch == "auto" else batch
        return samples * self.training.gradient_accumulation * world_size

    @property
    def cache_memory_bytes(self) -> int:
        """Return cache.memory_size in bytes."""
        return _megabytes(self.cache.memory_size)

    @property
    def cache_disk_bytes(self) -> int:
        """Return the smaller of cache.disk_size and memory.cache_size in bytes."""
        disk = _megabytes(self.cache.disk_size)
        return disk if self.memory.cache_size is None else min(disk, parse_size(self.memory.cache_size))

    @property
    def cache_max_age_seconds(self) -> float:
        """Return the shorter of cache.max_age_days and memory.cache_ttl in seconds."""
        age = self.cache.max_age_days * 86400
        return age if self.memory.cache_ttl is None else min(age, self.memory.cache_ttl)

    @model_validator(mode="after")
    def _settle(self) -> Self:
        """Give settings with several names one value, and draw what precision and attention imply."""
        given = {
            (name, key): getattr(getattr(self, name), key)
            for name in type(self).model_fields
            for key in getattr(self, name).model_fields_set
        }
        for first, second, rule in disagree(given):
            one, other = (f"{'.'.join(key)}: {given[key]!r}" for key in (first, second))
            raise ValueError(f"{one} and {other} do not go together: it {rule}")
        for names in ALIASES:
            chosen = [given[name] for name in names if name in given]
            if chosen:
                self._put(dict.fromkeys(names, chosen[0]))
        if self.processing.precision == "fp32" or not self.processing.mixed_precision:
            self._put({_PRECISION: "fp32", _MIXED: False, ("training", "mixed_precision"): False})
        if self.processing.attention == "eager" or not self.training.memory_efficient_attention:
            self._put({_ATTENTION: "eager", _EFFICIENT: False})
        return self

    def _put(self, values: Mapping[Key, object]) -> None:
        # Sections are copied, never changed: the caller may hold them. The tree itself is still being built.
        for (section, key), value in values.items():
            self.__dict__[section] = getattr(self, section).model_copy(update={key: value})


def _megabytes(size: int | str) -> int:
    return size * 1000**2 if isinstance(size, int) else parse_size(size)
