"""What a run stands on: device, threads, model, data, each resolved from the configuration and said aloud."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from llamahome import __version__
from llamahome.config import Config, parse_size
from llamahome.data.batch import BatchProcessor
from llamahome.data.dataset import StepOrder
from llamahome.data.formats import find_files
from llamahome.data.prepare import Prepared, prepare
from llamahome.data.prepared import find_prepared
from llamahome.data.report import unpack_place
from llamahome.data.store import TokenStore
from llamahome.distributed.ranks import ALONE, Ranks, require_same
from llamahome.errors import ConfigError, MissingError, ModelError, UsageError
from llamahome.memory.flops import training_flops
from llamahome.memory.plan import MemoryPlan
from llamahome.memory.shape import ModelShape, model_shape
from llamahome.model import attention
from llamahome.model.adapters import apply_adapter, enable_checkpointing, trainable_parameters, without_input_casts
from llamahome.model.checks import check_model_folder
from llamahome.model.compile import compile_layers
from llamahome.model.fake_quant import from_step
from llamahome.model.fuse import fuse
from llamahome.model.load import (
    ModelSource,
    load_model,
    load_tokenizer,
    load_trained,
    model_fingerprint,
    resolve_model,
)
from llamahome.monitor.metrics import MetricsCollector, load_metrics
from llamahome.monitor.resources import ResourceMonitor
from llamahome.monitor.tracker import PerformanceTracker, measure_matmul_peak
from llamahome.training.begin import begin_adapter
from llamahome.training.budget import build_governor
from llamahome.training.checkpoint import TrainingState
from llamahome.training.choices import choices, chosen
from llamahome.training.extensions import NOTHING, Extensions
from llamahome.training.host import (
    give_freed_memory_back,
    keep_freed_memory,
    pages_and_nodes,
    set_threads,
    use_compile_cache,
)
from llamahome.training.loop import TrainingLoop
from llamahome.training.low_bit import require_optimizer
from llamahome.training.objective import Objective, build_objective, flat_row
from llamahome.training.optim import build_optimizer, build_scheduler
from llamahome.training.parallel import form_team, per_rank, share_out, stored_dtype
from llamahome.training.precision import Precision, resolve_precision
from llamahome.training.recovery import resumed_state
from llamahome.training.rundir import RunFolder
from llamahome.training.saving import restore
from llamahome.training.step import StepBatches
from llamahome.training.team import SINGLE, Team

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Assembled:
    """The parts of a run, ready for its first step, and the facts that run.json records."""

    model: Any
    tokenizer: Any
    loop: TrainingLoop
    prepared: Prepared
    resources: ResourceMonitor
    facts: dict[str, Any]


def assemble(
    config: Config, folder: RunFolder, found: Path | None, own: Extensions = NOTHING, *, ranks: Ranks = ALONE,
    progress: Callable[[], None] = lambda: None,
) -> Assembled:  # fmt: skip
    """Build every part of the run in `folder`, at step 0 or as the checkpoint `found` left it, together with all ranks.

    Raises: ConfigError, DataError, ModelError, MemoryLimitError, StorageError, CheckpointError, DistributedError.
    """
    config = per_rank(config, ranks)
    metrics = {**load_metrics(config.training.metrics), **own.metrics}
    check_best_metric(config, metrics)
    data = _named_data(config, own)
    device = resolve_device(config) if ranks.device == "cpu" else torch.device("cuda", ranks.local_rank)
    require_optimizer(own.optimizer or config.optimization.optimizer, device)
    source = resolve_model(None, config.model, config.cache.dir)
    check_model_folder(source.folder, trust_remote_code=source.trust_remote_code, allow_pickle=source.allow_pickle)
    tokenizer = load_tokenizer(source)
    architecture = json.loads((source.folder / "config.json").read_bytes())
    shape = model_shape(architecture)
    prepared = ranks.main_first(
        lambda: prepare(data, tokenizer, config=config, eval_data=own.eval_data or config.data.eval_path,
                        vocab_size=shape.vocabulary), "prepare the data",
    )  # fmt: skip
    state = _state(config, prepared, source, found, ranks.size)
    require_same(ranks, {
        "data": state.data_fingerprint, "model": state.model_fingerprint, "version of torch": torch.__version__,
        "version of llamahome": __version__, "configuration": json.dumps(config.to_dict(), sort_keys=True),
    })  # fmt: skip
    config = settled(config, state)
    precision = resolve_precision(config, device)
    state.threads = set_threads(config, state.threads)
    allocator = keep_freed_memory()
    use_compile_cache(config)
    team, governor = form_team(
        config, ranks, progress=progress,
        build=lambda parts: build_governor(
            config, architecture, prepared.train, state, precision, device, folder.path, parts
        ),
    )  # fmt: skip
    if team.in_lockstep and device.type == "cpu":
        allocator = give_freed_memory_back()
    plan = governor.plan
    model, objective, fused = _build_model(
        config, source, architecture, device, precision, plan, team, own,
        begins_on=None if found else prepared.train,
    )  # fmt: skip
    batches = build_batches(config, prepared, state.samples_per_step, objective, team)
    mode = compile_layers(
        objective.causal, config.processing.compile_mode, tokens=_tokens_to_train(prepared, state),
        trial=lambda tokens: _try_once(objective, precision, tokens),
    )  # fmt: skip
    state.choices = chosen(precision, mode, plan)
    trained = sum(parameter.numel() for _, parameter in trainable_parameters(model))
    optimizer = build_optimizer(model, config.optimization, own.optimizer)
    resources = ResourceMonitor(
        folder.path, dict(config.monitor.thresholds.items()),
        memory_share=lambda: governor.reading.used_bytes / governor.limit_bytes,
    )  # fmt: skip
    loop = TrainingLoop(
        model, optimizer, batches, state=state, objective=objective, precision=precision, governor=governor,
        scheduler=build_scheduler(optimizer, config.optimization, state.total_steps, own.scheduler),
        max_grad_norm=config.optimization.max_grad_norm, on_nonfinite=config.optimization.on_nonfinite,
        spike_factor=config.optimization.spike_factor,
        metrics=MetricsCollector(
            metrics=metrics, memory_limit_bytes=governor.limit_bytes,
            tracker=_tracker(config, shape, trained, precision, state),
            read_memory=lambda: governor.reading, gpu_utilization=resources.gpu_utilization,
        ),
        team=team, begin_step=from_step(model, config.qat.start_step),
    )  # fmt: skip
    loop.begin_step(state.step)
    # Room for two checkpoints: weights and AdamW's two moments in fp32.
    folder.require_free(2 * 12 * trained + parse_size(config.resource.min_free_disk))
    if found is not None:
        restore(found, model, optimizer, loop.scheduler, loop.scaler, team)
    facts = _facts(loop, prepared, device=device, trained=trained, fused=fused, allocator=allocator)
    for line in choices(config, facts):
        logger.info("%s", line)
    return Assembled(model, tokenizer, loop, prepared, resources, facts)


def _build_model(
    config: Config, source: ModelSource, architecture: dict[str, Any], device: torch.device, precision: Precision,
    plan: MemoryPlan, team: Team, own: Extensions, *, begins_on: TokenStore | None,
) -> tuple[Any, Objective, str]:  # fmt: skip
    """The model with its adapter as this rank holds it, the objective over it, and what was fused in a line.

    `begins_on`: samples that the adapter's first values may depend on; None where a checkpoint brings its values.
    """
    model = load_for_training(
        config, source, device, precision, checkpointing=plan.gradient_checkpointing,
        stored=stored_dtype(architecture, torch.float32) if team.strategy == "shard" else None,
    )  # fmt: skip
    if begins_on is not None:
        begin_adapter(model, config, begins_on, precision, team.ranks)
    fused = fuse(model, recompute_mlp=plan.recompute_mlp).summary() if config.processing.fuse else "none"
    enter = share_out(model, config, team, precision)
    return (
        model,
        build_objective(model, own.loss or config.training.loss, chunk_rows=plan.loss_rows, enter=enter),
        fused,
    )


def _facts(
    loop: TrainingLoop, prepared: Prepared, *, device: torch.device, trained: int, fused: str, allocator: str
) -> dict[str, Any]:
    """What run.json records of a run besides its configuration."""
    state, governor, team = loop.state, loop.governor, loop.team
    assert governor is not None
    return {
        "data_fingerprint": state.data_fingerprint,
        "model_fingerprint": state.model_fingerprint,
        "data": prepared.report.to_dict(),
        "device": str(device),
        "precision": loop.precision.name,
        "attention": loop.objective.causal.config._attn_implementation,
        "compile_mode": state.choices["processing.compile_mode"],
        "threads": state.threads,
        "ranks": team.ranks.size,
        "strategy": team.strategy,
        "allocator": allocator,
        **pages_and_nodes(),
        "fused": fused,
        "total_steps": state.total_steps,
        "samples_per_step": state.samples_per_step,
        "trainable_parameters": trained,
        "memory_plan": governor.plan.at(governor.token_budget).to_dict(),
        "memory_limit_bytes": governor.limit_bytes,
    }


def _state(
    config: Config, prepared: Prepared, source: ModelSource, found: Path | None, ranks: int = 1
) -> TrainingState:
    """Step 0 of this configuration, or the checkpoint's state after a comparison with data and model."""
    data, model = prepared.train.fingerprint, model_fingerprint(source.folder)
    if found is not None:
        state = resumed_state(found, data, model)
        for key, asked_for, stored in (
            ("training.seed", config.training.seed, state.seed), ("data.shuffle", config.data.shuffle, state.shuffle)
        ):  # fmt: skip
            if asked_for != stored:
                raise ConfigError(f"{asked_for} would change the samples of the steps, the run has {stored}", where=key,
                                  fix="leave it out, or start a new run")  # fmt: skip
        asked = config.optimization.global_batch_size
        if asked is not None and asked != state.samples_per_step:
            raise ConfigError(
                f"{asked} samples per step, the run has {state.samples_per_step}",
                where="optimization.global_batch_size", fix="leave it out; training.batch_size may change",
            )  # fmt: skip
    else:
        state = TrainingState(samples_per_step=config.global_batch_size(ranks), seed=config.training.seed)
        state.data_fingerprint, state.model_fingerprint, state.shuffle = data, model, config.data.shuffle
    steps_per_epoch = -(-len(prepared.train) // state.samples_per_step)
    state.total_steps = config.optimization.max_steps or config.training.epochs * steps_per_epoch
    return state


def settled(config: Config, state: TrainingState) -> Config:
    """`config` with what a resumed run chose for `auto` when it began: other choices would give other bits."""
    stored = {
        key: value
        for key, value in state.choices.items()
        if getattr(config.processing, key.partition(".")[2]) == "auto"
    }
    if stored.get("processing.precision") == "fp32":
        stored |= {"processing.mixed_precision": False}
    return config.with_values(stored) if stored else config


def _try_once(objective: Objective, precision: Precision, tokens: int) -> None:
    """Forward and backward over some tokens in two samples; no gradient is left."""
    model = objective.model.train()
    ids = [5 + i % 7 for i in range(tokens)]
    with without_input_casts(model, precision.lowers):
        with precision.autocast():
            loss = objective(flat_row([ids[: tokens // 2], ids[tokens // 2 :]]))
        loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)


def _tracker(
    config: Config, shape: ModelShape, trained: int, precision: Precision, state: TrainingState
) -> PerformanceTracker:
    """Throughput, and the share of this machine's measured matrix-product peak that it is."""
    full = config.trains_base
    flops = training_flops(
        shape.linear_parameters, shape.vocabulary * shape.hidden, adapter_parameters=0 if full else trained,
        trains_base=full,
    )  # fmt: skip
    peak = measure_matmul_peak(precision.name, precision.device)
    return PerformanceTracker(total_steps=state.total_steps, flops=flops, peak_flops=peak)


def _tokens_to_train(prepared: Prepared, state: TrainingState) -> int:
    return prepared.train.num_tokens * (state.total_steps - state.step) * state.samples_per_step // len(prepared.train)


def _named_data(config: Config, own: Extensions) -> Any:
    """What to train on; a path that leads nowhere is told before a model is read."""
    data = own.data or config.data.path
    if data is None:
        raise UsageError("no data to train on", where="data.path", fix="name a file, folder, glob or hub id")
    if not find_prepared(data):
        find_files(data, config.data)
    return data


def resolve_device(config: Config) -> torch.device:
    """The device asked for, or a GPU where there is one. Raises: MissingError when it is not there."""
    asked = config.processing.device
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(asked.partition(":")[2] or 0) >= count:
            raise MissingError(f"{asked} asked for, {count} CUDA devices found", where="processing.device",
                               fix="set processing.device: auto")  # fmt: skip
    return torch.device(asked)


def check_best_metric(config: Config, metrics: Iterable[str]) -> None:
    """Raises: ConfigError when `training.best_metric` names no figure of an evaluation's record."""
    known = ["eval_loss", "eval_perplexity", "eval_token_accuracy", *metrics]
    if config.training.best_metric not in known:
        raise ConfigError(f"no figure is called {config.training.best_metric!r}", where="training.best_metric",
                          fix=f"choose one of {', '.join(known)}")  # fmt: skip


def attention_name(config: Config) -> str:
    """The implementation's name for transformers."""
    asked = config.processing.attention
    if not config.training.memory_efficient_attention:
        return "eager"
    return attention.NAME if asked == "auto" else asked


def load_for_training(
    config: Config, source: ModelSource, device: torch.device, precision: Precision, *,
    checkpointing: bool | int, stored: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """The base model in the precision of frozen weights (fp32 where they are trained), with its adapter.

    A model that is going to be shared out comes on the CPU, and in its `stored` type where it is trained.
    """
    device = device if stored is None else torch.device("cpu")
    dtype, nf4 = (
        (stored or torch.float32) if config.trains_base else precision.frozen,
        config.training.method == "qlora",
    )
    model = _with_attention(
        config, lambda name: load_model(source, dtype=dtype, device=device, attention=name, nf4=nf4)
    )
    model = apply_adapter(model, config)
    if checkpointing:
        enable_checkpointing(model, checkpointing)
    return model


def _with_attention(config: Config, load: Callable[[str], T]) -> T:
    """What `load` gives for the attention asked for; `auto` falls back where an architecture does not know ours."""
    name = attention_name(config)
    try:
        return load(name)
    except (ConfigError, ModelError) as error:
        if config.processing.attention != "auto" or repr(name) not in error.what:
            raise
        logger.info("this architecture has its own attention: processing.attention is eager")
        return load("eager")


def load_trained_model(path: str, config: Config, device: torch.device, precision: Precision) -> tuple[Any, Any]:
    """A model, adapter or checkpoint folder (or a hub id), ready for evaluation, and its tokenizer."""
    model, tokenizer = _with_attention(
        config,
        lambda name: load_trained(
            path, config.model, dtype=precision.frozen, device=device, attention=name, cache_dir=config.cache.dir
        ),
    )
    return model.eval(), tokenizer


def prepare_evaluation(data: str | Path, tokenizer: Any, config: Config) -> TokenStore:
    """A whole data file as one store, nothing split off."""
    whole = config.with_values({"data.validation_split": 0.0})
    return prepare(data, tokenizer, config=whole).train


def build_batches(
    config: Config, prepared: Prepared, samples_per_step: int, objective: Objective, team: Team = SINGLE
) -> StepBatches:
    """The steps' samples and their cut; one sample at a time for a model that mixes packed samples."""
    store = prepared.train
    order = StepOrder(len(store), samples_per_step, seed=config.training.seed, shuffle=config.data.shuffle)
    max_samples = None if config.training.batch_size == "auto" else int(config.training.batch_size)
    if not objective.packs:
        logger.warning("%s mixes samples that share a row: one sample per micro-batch", type(objective.causal).__name__)
        max_samples = 1
    pin = config.training.pin_memory and objective.head.weight.device.type == "cuda"
    place = lambda i: prepared.report.place(unpack_place(store.source(i)))  # noqa: E731
    return StepBatches(
        store,
        order,
        BatchProcessor(store, pin, objective.rounds_rows),
        max_samples,
        place,
        config.training.prefetch_factor,
        rank=team.ranks.rank,
        ranks=team.ranks.size,
        in_lockstep=team.in_lockstep,
    )
