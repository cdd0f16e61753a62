"""A whole run: from the configuration to a trained model on disk."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from llamahome.config import Config, parse_size
from llamahome.errors import Interrupted, LlamaHomeError, MemoryLimitError, StorageError
from llamahome.memory.gpu import trim_gpu_cache
from llamahome.memory.oom import free_memory, is_oom, twice
from llamahome.monitor.metrics import StepRecord
from llamahome.monitor.progress import Progress
from llamahome.monitor.report import write_report
from llamahome.monitor.sinks import JsonlSink, MetricSink, build_sinks
from llamahome.monitor.trackers import require_trackers
from llamahome.monitor.words import program, short_path
from llamahome.training import checkpoint as checkpoints
from llamahome.training.callbacks import Callback, call_all, load_callbacks
from llamahome.training.checkpoint import TrainingState
from llamahome.training.evaluate import Evaluation, evaluate_store
from llamahome.training.extensions import Extensions
from llamahome.training.loop import TrainingLoop
from llamahome.training.parallel import Place, explained, launch_name, open_place
from llamahome.training.preflight import preflight
from llamahome.training.recovery import rewind
from llamahome.training.rundir import RunFolder, State, read_run
from llamahome.training.sample import sample
from llamahome.training.saving import export, save
from llamahome.training.setup import Assembled, assemble
from llamahome.training.signals import StopSignal, agree
from llamahome.training.trust import resumed_config as trusted_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    output: Path
    steps: int
    before: Evaluation | None
    after: Evaluation | None
    best_step: int | None

    def summary(self) -> list[str]:
        """Lines for a person."""
        lines = []
        if self.before and self.after:
            lines.append(f"held-out loss {self.before.loss:.4f} before, {self.after.loss:.4f} after {self.steps} steps")
        elif self.after:
            lines.append(f"held-out loss {self.after.loss:.4f} after {self.steps} steps")
        lines.append(f"model in {short_path(self.output / 'final')}")
        lines.append(f"talk to it: {program()} chat {quote(short_path(self.output))}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The same for a machine: the last line of `train --json`."""
        return {"event": "done", **asdict(self), "output": str(self.output)}


@dataclass
class Run:
    """One run while it goes on: the loop, what watches it, and where it writes."""

    config: Config
    folder: RunFolder
    place: Place
    parts: Assembled
    loop: TrainingLoop
    sinks: list[MetricSink]
    view: Progress | None
    callbacks: list[Callback]
    before: Evaluation | None = None
    after: Evaluation | None = None
    saved_step: int = field(default=-1)

    @property
    def state(self) -> TrainingState:
        return self.loop.state


def train(
    config: Config, own: Extensions | None = None, *, view: Progress | None = None, signals: StopSignal | None = None,
    before: Callable[[Any, Any], None] | None = None, after: Callable[[Any, Any], None] | None = None,
) -> RunResult:  # fmt: skip
    """Train by `config` from step 0; what `llamahome train` calls.

    `own` holds objects that stand in for names of the configuration. `view` shows progress; `before` and `after` are
    called with the model and its tokenizer.
    Raises: any LlamaHomeError; Interrupted after a signal, the state saved.
    """
    with open_place(config, Path(config.training.output)) as place:
        shown = view if place.ranks.is_main else None
        return _guarded(config, own or Extensions(), place, shown, signals or StopSignal(), before, after)


def resume(
    checkpoint: Path, overrides: Sequence[str] = (), config_file: Path | None = None, *,
    own: Extensions | None = None, view: Callable[[Config], Progress] | None = None, signals: StopSignal | None = None,
    trust_run: bool = False,
) -> RunResult:  # fmt: skip
    """Go on from a checkpoint, or from the newest good one of a run folder; what `llamahome train-resume` calls.

    The run's own configuration holds, changed by `overrides`. The samples per step stay as they were. A run that began
    with objects of the user's own needs them again as `own`. Code that the run's record names as `module:object` is
    imported when it is named in `overrides` or `config_file` as well, or under `trust_run`.
    Raises: as `train`; UsageError without those objects, or for such code.
    """
    config = resumed_config(checkpoint, overrides, config_file, trust_run=trust_run)
    own = own or Extensions()
    own.refuse_less_than(read_run(checkpoints.run_of(checkpoint)).get("extensions", {}))
    with open_place(config, checkpoints.run_of(checkpoint), checkpoint) as place:
        shown = view(config) if view and place.ranks.is_main else None
        return _guarded(config, own, place, shown, signals or StopSignal(), None, None)


def resumed_config(
    checkpoint: Path, overrides: Sequence[str] = (), config_file: Path | None = None, *, trust_run: bool = False
) -> Config:
    """The configuration of the run that `checkpoint` belongs to, changed; for `trust_run` see `resume`.

    Raises: CheckpointError, ConfigError, UsageError.
    """
    run = checkpoints.run_of(checkpoint)
    return trusted_config(read_run(run)["config"], overrides, config_file, where=run, trust_run=trust_run)


def _guarded(
    config: Config, own: Extensions, place: Place, view: Progress | None, signals: StopSignal,
    before: Callable[[Any, Any], None] | None, after: Callable[[Any, Any], None] | None,
) -> RunResult:  # fmt: skip
    """The run, with its end written to status.json whatever happens."""
    folder, recovery = place.folder, place.recovery
    step = recovery.step if recovery else 0
    folder.write_status("running", None, "starting", step, resumable=recovery is not None)
    run = None
    try:
        run = _open(config, own, place, view)
        if before:
            before(run.parts.model, run.parts.tokenizer)
        _go(run, signals)
        if after:
            after(run.parts.model, run.parts.tokenizer)
        folder.write_status("done", 0, "finished", run.state.step, resumable=False)
        return RunResult(folder.path, run.state.step, run.before, run.after, run.state.best_step)
    except BaseException as error:
        error = explained(error, place, run.loop if run else None)
        if is_oom(error):
            error = MemoryLimitError(
                f"out of memory: {str(error).strip() or type(error).__name__}", where="training.memory_limit",
                fix="lower data.max_length, or set processing.gradient_checkpointing: true",
            ).with_traceback(error.__traceback__)  # fmt: skip
        code = error.exit_code if isinstance(error, LlamaHomeError) else 1
        step = run.state.step if run else step
        state: State = "stopped" if isinstance(error, Interrupted) else "failed"
        resumable = bool(checkpoints.checkpoints(folder.path))
        try:
            folder.write_status(state, code, str(error), step, resumable=resumable)
        except StorageError as second:  # the first error says why the run ended
            logger.warning("%s", second)
        raise error
    finally:
        if run:
            _close(run)


def _open(config: Config, own: Extensions, place: Place, view: Progress | None) -> Run:
    """Everything a run needs, ready for its first step."""
    folder, recovery, ranks = place.folder, place.recovery, place.ranks
    found = recovery.checkpoint if recovery else None
    require_trackers(config.monitor.sinks)
    with place.patient():
        parts = assemble(config, folder, found, own, ranks=ranks, progress=place.progress)
    if recovery:
        recovery.recover()
    sinks = []
    if ranks.is_main:
        sinks = build_sinks([*config.monitor.sinks, *own.sinks], folder.path, config.to_dict())
    callbacks = load_callbacks([*config.training.callbacks, *own.callbacks])
    run = Run(config, folder, place, parts, parts.loop, sinks, view, callbacks)
    parts.loop.on_event = lambda event: _event(run, event)
    parts.loop.faults.rewind = lambda: _rewind(run)
    folder.write_run(config.to_dict(), {**parts.facts, "extensions": own.names(), "launch": launch_name()})
    if view:
        view.start(parts.loop.state.total_steps, parts.loop.state.step)
    if found:
        run.saved_step = parts.loop.state.step
        _event(run, {"event": "resumed", "step": parts.loop.state.step, "checkpoint": found.name})
    return run


def _go(run: Run, signals: StopSignal) -> None:
    """The loop with evaluations, checkpoints and callbacks, to the last step or a reason to stop."""
    config, state = run.config.training, run.state
    _stop_here(run, signals)
    if not run.place.ranks.several:
        for event in preflight(run.config, run.parts, run.folder):
            _event(run, event)
    if state.step == 0:
        _sampled(run)
    _forget_peak(run)
    _stop_here(run, signals)
    call_all(run.callbacks, "train_begin", run.loop, {})
    if state.step == 0 and run.parts.prepared.validation is not None:
        run.before = _evaluate(run)
        _event(run, {"event": "evaluation", "step": 0, **_eval_fields(run.before)})
        _stop_here(run, signals)
    every = config.eval_steps or run.loop.batches.order.steps_per_epoch
    if run.loop.faults.may_rewind and not checkpoints.checkpoints(run.folder.path):
        _save(run)  # something to go back to
    for record in run.loop:
        last = state.step == state.total_steps
        wants_stop = call_all(run.callbacks, "step", run.loop, record)
        if run.parts.prepared.validation is not None and (state.step % every == 0 or last):
            wants_stop |= _evaluated(run, record)
        _record(run, record)
        asked = agree(run.place.ranks, signals, wants_stop)
        if asked.ends:
            run.loop.stop()
        if state.step % config.save_steps == 0 or last or asked.save or asked.ends:
            signals.save = False
            _save(run)
        if not last:
            _stop_here(run, signals)
    _sampled(run)
    _export(run, "final")
    call_all(run.callbacks, "train_end", run.loop, {})


def _export(run: Run, name: str) -> None:
    with run.place.patient():
        export(run.parts.model, run.parts.tokenizer, run.folder.path / name, run.loop.team)


def _stop_here(run: Run, signals: StopSignal) -> None:
    """Raises: Interrupted when a signal has come, the state saved."""
    if (stop := agree(run.place.ranks, signals).stop) is not None:
        _save(run)
        _event(run, {"event": "signal", "step": run.state.step, "signal": stop})
        raise Interrupted(stop, where=str(run.folder.path))


def _evaluate(run: Run) -> Evaluation:
    parts = run.parts
    assert parts.prepared.validation is not None
    assert parts.loop.governor is not None
    evaluation = evaluate_store(
        parts.loop.objective, parts.prepared.validation, precision=parts.loop.precision,
        token_budget=parts.loop.governor.token_budget, max_samples=run.config.training.eval_samples,
        team=parts.loop.team,
    )  # fmt: skip
    _forget_peak(run)
    return evaluation


def _sampled(run: Run) -> None:
    """A sample answered by the model as it is, where somebody looks on."""
    if run.view and not run.place.ranks.several:
        _event(run, sample(run.parts))


def _forget_peak(run: Run) -> None:
    """The governor learns from the peaks of steps, not of what ran between them and what the heap kept of it."""
    free_memory()
    if run.loop.governor is not None:
        run.loop.governor.monitor.reset_peak()


def _eval_fields(evaluation: Evaluation) -> dict[str, float]:
    return {
        "eval_loss": evaluation.loss,
        "eval_perplexity": evaluation.perplexity,
        "eval_token_accuracy": evaluation.token_accuracy,
    }


def _evaluated(run: Run, record: StepRecord) -> bool:
    """Evaluate, keep the best model, and say whether patience is over."""
    run.after = _evaluate(run)
    record.update(_eval_fields(run.after))
    wants_stop = call_all(run.callbacks, "evaluate", run.loop, record)
    settings, state = run.config.optimization, run.state
    value = record[run.config.training.best_metric]
    if _is_better(value, run.config.training.best_metric, state.best_value, settings.early_stopping_min_delta):
        state.best_value, state.evaluations_without_gain, state.best_step = value, 0, state.step
        _export(run, "best")
    else:
        state.evaluations_without_gain += 1
    patience = settings.early_stopping_patience
    if patience is not None and state.evaluations_without_gain >= patience:
        _event(run, {"event": "early_stop", "step": state.step, "best": state.best_value})
        return True
    return wants_stop


def _is_better(value: float | None, metric: str, best: float | None, min_delta: float) -> bool:
    """Accuracies should rise, all else should fall; what is no finite number is never better."""
    if value is None or not math.isfinite(value):
        return False
    return best is None or (value - best if "accuracy" in metric else best - value) > min_delta


def _save(run: Run) -> None:
    if run.saved_step == run.state.step:
        return
    parts, loop = run.parts, run.loop
    for sink in run.sinks:
        if isinstance(sink, JsonlSink):
            sink.sync()
    write = partial(
        save, run.folder.path, run.state, parts.model, parts.tokenizer, loop.optimizer, loop.scheduler, loop.scaler,
        loop.team,
    )  # fmt: skip
    with run.place.patient():
        path = write() if loop.team.ranks.several else twice(write)
    _forget_peak(run)
    run.saved_step = run.state.step
    run.folder.write_status("running", None, f"step {run.state.step} saved", run.state.step, resumable=True)
    if run.place.ranks.is_main:
        checkpoints.retain(run.folder.path, run.config.training.keep_last)
    _event(run, {"event": "checkpoint", "step": run.state.step, "path": path.name})
    call_all(run.callbacks, "checkpoint", run.loop, {"path": str(path), "step": run.state.step})


def _record(run: Run, record: StepRecord) -> None:
    for sink in run.sinks:
        sink.write(record)
    if run.view:
        run.view.step(record)
        if "eval_loss" in record:
            run.view.evaluation(record)
    if (kept := run.config.memory.gpu_cache_size) is not None:
        trim_gpu_cache(run.parts.model.device, parse_size(kept))
    for event in run.parts.resources.check():
        _event(run, {"step": run.state.step, **event})


def _rewind(run: Run) -> None:
    """Bring the run back to its newest good checkpoint, and its records too."""
    rewind(run.folder.path, run.loop)
    for sink in run.sinks:
        if isinstance(sink, JsonlSink):
            sink.go_back(run.state.step)


def _event(run: Run, event: dict[str, Any]) -> None:
    for sink in run.sinks:
        sink.event(event)
    if run.view and event["event"] == "evaluation":
        run.view.evaluation(event)
    elif run.view:
        run.view.event(event)


def _close(run: Run) -> None:
    for sink in run.sinks:
        sink.close()
    if run.view:
        run.view.finish()
    run.parts.prepared.close()
    if not run.place.ranks.is_main:
        return
    try:
        write_report([run.folder.path])
    except LlamaHomeError as error:  # the run's end is decided; a full disk must not hide it
        logger.warning("no report: %s", error)
