"""What a caller hands to `train` as Python objects, in place of names in the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from llamahome.data.recipe import Data
from llamahome.errors import UsageError
from llamahome.monitor.metrics import Metric
from llamahome.monitor.sinks import MetricSink
from llamahome.plugins import name_of
from llamahome.training.callbacks import Callback
from llamahome.training.objective import LossFunction
from llamahome.training.optim import OptimizerFactory, Schedule


@dataclass(frozen=True, kw_only=True)
class Extensions:
    """Objects of the user's own for one run.

    data, eval_data: instead of `data.path` and `data.eval_path`; also rows, see `llamahome.data.own.Dataset`.
    loss, optimizer, scheduler: instead of `training.loss`, `optimization.optimizer` and `.scheduler_type`.
    callbacks, metrics (by name), sinks: beside those of the configuration.
    """

    data: Data | None = None
    eval_data: Data | None = None
    loss: LossFunction | None = None
    optimizer: OptimizerFactory | None = None
    scheduler: Schedule | None = None
    callbacks: Sequence[Callback] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    sinks: Sequence[MetricSink] = ()

    def names(self) -> dict[str, list[str]]:
        """What was handed over, by field, as `module:object`; for run.json."""
        found: dict[str, list[str]] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not value:
                continue
            several = list(value.values()) if isinstance(value, Mapping) else value
            listed = list(several) if entry.name in ("callbacks", "metrics", "sinks") else [several]
            found[entry.name] = [item if isinstance(item, str) else name_of(item) for item in listed]
        return found

    def refuse_less_than(self, recorded: Mapping[str, Sequence[str]]) -> None:
        """Raises: UsageError when the run in `recorded` had an object that is not here."""
        here = self.names()
        missing = {entry: names for entry, names in recorded.items() if set(names) - set(here.get(entry, ()))}
        if missing:
            listed = "; ".join(f"{entry}: {', '.join(names)}" for entry, names in missing.items())
            raise UsageError(f"the run was begun from Python with objects of its own ({listed})", where="run.json",
                             fix="resume it from Python with the same objects, as own=Extensions(...)")  # fmt: skip


NOTHING = Extensions()
