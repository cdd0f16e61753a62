"""Trackers of others: their calls in order, each imported only when named, and one line for one that is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamahome.errors import MissingError
from llamahome.monitor.sinks import build_sinks
from llamahome.monitor.trackers import TRACKERS, MlflowSink, RunSink, require_trackers, scalars

RECORD = {"step": 3, "loss": 0.5, "tokens": 7, "mfu": None, "flag": True, "note": "x"}
EVALUATION = {"event": "evaluation", "step": 3, "eval_loss": 0.25}


class FakeRun:
    """What `init` of Weights & Biases and of trackio gives."""

    def __init__(self, **options: Any) -> None:
        self.options, self.calls = options, []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((step, metrics))

    def finish(self) -> None:
        self.calls.append("finish")


def test_scalars_are_the_numbers_without_the_step() -> None:
    assert scalars(RECORD) == {"train/loss": 0.5, "train/tokens": 7.0}
    assert scalars(EVALUATION) == {"eval/loss": 0.25}


def test_wandb_and_trackio_get_steps_evaluations_and_an_end(tmp_path: Path) -> None:
    made: list[FakeRun] = []
    module = SimpleNamespace(init=lambda **options: made.append(FakeRun(**options)) or made[-1])
    sink = TRACKERS["wandb"](module, tmp_path, {"training": {"seed": 1}})
    assert isinstance(sink, RunSink)
    sink.write(RECORD)
    sink.event(EVALUATION)
    sink.event({"event": "oom", "step": 3})
    sink.close()
    (run,) = made
    assert run.options == {
        "project": "llamahome", "name": tmp_path.name, "config": {"training": {"seed": 1}}, "dir": str(tmp_path)
    }  # fmt: skip
    assert run.calls == [(3, {"train/loss": 0.5, "train/tokens": 7.0}), (3, {"eval/loss": 0.25}), "finish"]


class FakeMlflow:
    """The client and the entities of MLflow that are used."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.entities = SimpleNamespace(Metric=lambda *values: values, Param=lambda *values: values)

    def MlflowClient(self) -> FakeMlflow:  # noqa: N802 - MLflow's name
        return self

    def get_experiment_by_name(self, name: str) -> None:
        self.calls.append(("find", name))

    def create_experiment(self, name: str) -> str:
        self.calls.append(("create", name))
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.calls.append(("run", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="r"))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        self.calls.append((run, [(m[0], m[1], m[3]) for m in metrics], list(params)))

    def set_terminated(self, run: str) -> None:
        self.calls.append(("end", run))


def test_mlflow_gets_parameters_in_batches_and_metrics_with_their_steps(tmp_path: Path) -> None:
    fake = FakeMlflow()
    sink = MlflowSink(fake, tmp_path, {"lora": {str(i): i for i in range(120)}})
    sink.write(RECORD)
    sink.close()
    assert fake.calls[:3] == [("find", "llamahome"), ("create", "llamahome"), ("run", "7", tmp_path.name)]
    assert [len(params) for _, _, params in fake.calls[3:5]] == [100, 20]
    assert fake.calls[5:] == [("r", [("train/loss", 0.5, 3), ("train/tokens", 7.0, 3)], []), ("end", "r")]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_ends_with_the_command_to_type(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamahome.monitor.trackers.find_spec", lambda _: None)
    with pytest.raises(MissingError) as raised:
        build_sinks([name], tmp_path)
    assert str(raised.value) == f"{name} is not installed; monitor.sinks; pip install {name}"
    assert raised.value.exit_code == 9
    require_trackers(("tensorboard", "none", "own:Sink"))


def test_no_tracker_is_imported_unless_it_is_named() -> None:
    code = "import sys, llamahome.monitor.sinks; print({'wandb', 'mlflow', 'trackio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_a_sink_that_is_an_object_is_used_and_guarded(tmp_path: Path) -> None:
    seen: list[Any] = []
    own = SimpleNamespace(write=seen.append, event=seen.append, close=lambda: seen.append("close"))
    sinks = build_sinks([own], tmp_path)
    for sink in sinks:
        sink.write({"step": 1})
        sink.close()
    assert seen == [{"step": 1}, "close"]
