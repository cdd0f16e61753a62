"""Sinks for trackers that other people run: Weights & Biases, MLflow and trackio, each imported only when it is named.

Where they send things, and as whom, is the trackers' own business: their environment variables hold
(`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, `TRACKIO_SPACE_ID`). Steps carry the engine's own numbers.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llamahome.errors import MissingError

PROJECT = "llamahome"
_MAX_PARAMS = 100  # MLflow's limit for one call


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by their tracker's name: `train/loss`, `eval/loss`. The step is none of them."""
    return {
        _tag(name): float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


class RunSink:
    """Weights & Biases or trackio, which have the same interface: `init` gives a run with `log` and `finish`."""

    def __init__(self, module: Any, folder: Path, settings: Mapping[str, Any], **options: Any) -> None:
        self._run = module.init(project=PROJECT, name=folder.name, config=dict(settings), **options)

    def write(self, record: Mapping[str, Any], /) -> None:
        self._run.log(scalars(record), step=int(record["step"]))

    def event(self, event: Mapping[str, Any], /) -> None:
        """Events are no scalars; an evaluation's figures are."""
        if event.get("event") == "evaluation" and "step" in event:
            self.write(event)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """MLflow through its client, which keeps no run as the process's current one."""

    def __init__(self, module: Any, folder: Path, settings: Mapping[str, Any]) -> None:
        self._client = module.MlflowClient()
        self._metric = module.entities.Metric
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        flat = [
            (f"{s}.{k}", str(v)) for s, keys in settings.items() if isinstance(keys, Mapping) for k, v in keys.items()
        ]
        params = [module.entities.Param(key, value) for key, value in flat]
        for begin in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run, params=params[begin : begin + _MAX_PARAMS])

    def write(self, record: Mapping[str, Any], /) -> None:
        now, step = time.time_ns() // 10**6, int(record["step"])
        metrics = [self._metric(name, value, now, step) for name, value in scalars(record).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def event(self, event: Mapping[str, Any], /) -> None:
        """Events are no scalars; an evaluation's figures are."""
        if event.get("event") == "evaluation" and "step" in event:
            self.write(event)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _wandb(module: Any, folder: Path, settings: Mapping[str, Any]) -> RunSink:
    return RunSink(module, folder, settings, dir=str(folder))


TRACKERS: Mapping[str, Callable[[Any, Path, Mapping[str, Any]], RunSink | MlflowSink]] = MappingProxyType(
    {"wandb": _wandb, "mlflow": MlflowSink, "trackio": RunSink}
)


def require_trackers(names: tuple[object, ...]) -> None:
    """Raises: MissingError for a tracker among `names` whose package is not installed."""
    for name in names:
        if isinstance(name, str) and name in TRACKERS and find_spec(name) is None:
            raise MissingError(f"{name} is not installed", where="monitor.sinks", fix=f"pip install {name}")


def build_tracker(name: str, folder: Path, settings: Mapping[str, Any]) -> RunSink | MlflowSink:
    """The sink called `name` for the run in `folder`. Raises: MissingError, and whatever the tracker raises."""
    require_trackers((name,))
    return TRACKERS[name](importlib.import_module(name), folder, settings)
