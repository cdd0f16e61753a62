"""A run of several processes: joined at its start, its model and memory shared out, saved together, watched."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from llamahome.config import Config, parse_size
from llamahome.distributed.ranks import ALONE, Ranks, from_environment, is_peer_failure, joined, launched
from llamahome.distributed.shard import build_mesh, shard_model
from llamahome.distributed.watchdog import Watchdog
from llamahome.errors import CheckpointError, ConfigError, DistributedError, LlamaHomeError
from llamahome.files import read_json, remove_folder, write_json
from llamahome.memory.agree import keep_smaller_budget
from llamahome.memory.governor import MemoryGovernor
from llamahome.memory.oom import is_oom
from llamahome.model.compile import decoder_layers
from llamahome.training.host import usable_cores
from llamahome.training.loop import TrainingLoop
from llamahome.training.precision import Precision
from llamahome.training.recovery import ResourceRecovery
from llamahome.training.rundir import STATUS_FILE, RunFolder, read_run
from llamahome.training.team import Strategy, Team

logger = logging.getLogger(__name__)
Enter = Callable[..., Any]
_FAILURES = "failures"
_PEERS_SECONDS = 3.0  # in which the rank that failed first tells why
_ROOMY = 0.7  # share of the limit up to which a whole model on every rank is no question


class Onlooker:
    """The run's folder as ranks other than 0 see it: they write nothing of what belongs to the whole run."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def write_status(self, state: str, code: int | None, message: str, step: int, *, resumable: bool) -> None: ...

    def write_run(self, config: dict[str, Any], facts: dict[str, Any]) -> None: ...

    def require_free(self, needed: int) -> None: ...


@dataclass(frozen=True)
class Found:
    """The checkpoint that rank 0 goes on from, for the others; `recover` is rank 0's to do."""

    checkpoint: Path
    step: int

    def recover(self) -> Path:
        return self.checkpoint


@dataclass(frozen=True)
class Place:
    """Where a run takes place: its folder, the checkpoint it goes on from, its ranks and what watches them."""

    folder: RunFolder
    recovery: ResourceRecovery | None = None
    ranks: Ranks = ALONE
    watchdog: Watchdog | None = None

    def patient(self) -> AbstractContextManager[None]:
        """While the block runs, a rank may take its time."""
        return self.watchdog.patient() if self.watchdog else nullcontext()

    def progress(self) -> None:
        """The main thread has come further."""
        if self.watchdog:
            self.watchdog.progress()


@contextmanager
def open_place(config: Config, path: Path, checkpoint: Path | None = None) -> Iterator[Place]:
    """Join the other ranks and open the run's folder: rank 0 holds it, and says where the run goes on.

    A group that torchrun has started again, or under the name that this run began with and did not end, goes on from
    its newest good checkpoint, or anew where there is none; one that was told to go on from `checkpoint` does so again
    only while the run has none of its own after it.
    Raises: DistributedError, and what RunFolder and ResourceRecovery raise.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(_ranks(config))
        folder: RunFolder = cast(RunFolder, Onlooker(path))
        recovery: Any = None

        def open_here() -> list[Any] | None:
            nonlocal folder, recovery
            source = goes_on_from(path, checkpoint, ranks)
            folder = stack.enter_context(RunFolder(path, fresh=source is None))
            if source is not None:
                recovery = ResourceRecovery(source)
            return [str(recovery.checkpoint), recovery.step] if recovery else None

        told = ranks.decide(open_here, "open the run's folder")
        if told is not None and not ranks.is_main:
            recovery = Found(Path(told[0]), told[1])
        watchdog = None
        if ranks.several:

            def on_verdict(message: str) -> None:
                _write_failure(folder.path, message)

            watchdog = Watchdog(ranks, folder.path, config.distributed.timeout, on_verdict)
            stack.enter_context(watchdog)
        yield Place(folder, recovery, ranks, watchdog)


@contextmanager
def _ranks(config: Config) -> Iterator[Ranks]:
    if not launched():
        yield from_environment()
        return
    asked = config.processing.device
    cuda = asked.startswith("cuda") or (asked == "auto" and torch.cuda.is_available())
    # The watchdog speaks first; a collective's own timeout is for what it cannot see.
    with joined(1.5 * config.distributed.timeout + 30, "cuda" if cuda else "cpu") as ranks:
        if not ranks.is_main:
            logging.getLogger("llamahome").setLevel(logging.WARNING)
        yield ranks


def goes_on_from(path: Path, checkpoint: Path | None, ranks: Ranks) -> Path | None:
    """What the run in `path` goes on from: `checkpoint`, itself where this group has begun it, or None."""
    begun, again = _has_begun(path), ranks.restarts > 0
    if checkpoint is not None:
        return path if begun and again else checkpoint
    # Where torchrun itself was started anew it counts from 0: then its name tells, which a user may give.
    again = again or (begun and read_json(path / STATUS_FILE).get("state") != "done")
    return path if again and _clear_or_keep(path) else None


def _has_begun(path: Path) -> bool:
    """Whether this group of ranks came as far as to write its own run.json, with later checkpoints set aside."""
    try:
        return launch_name() is not None and read_run(path).get("launch") == launch_name()
    except CheckpointError:
        return False


def launch_name() -> str | None:
    """torchrun's name for this start of the group, which its restarts keep; None where it gives none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name in (None, "none") else name


def _clear_or_keep(path: Path) -> bool:
    """Whether the run in `path` has a checkpoint to go on from; without one its `best` would be in the way."""
    if any(path.glob("checkpoint-*")):
        return True
    remove_folder(path / "best")
    return False


def per_rank(config: Config, ranks: Ranks) -> Config:
    """The configuration with one rank's share of what the ranks of a host have together: cores, and a CPU's memory."""
    if not ranks.several:
        return config
    values: dict[str, object] = {}
    if config.processing.threads == "auto":
        values["processing.threads"] = max(1, usable_cores() // ranks.local_size)
    if ranks.device == "cpu":
        settings = {"training.memory_limit": config.training.memory_limit,
                    "memory.cpu_memory_limit": config.memory.cpu_memory_limit}  # fmt: skip
        values |= {key: _part(size, ranks.local_size) for key, size in settings.items() if size is not None}
    if config.processing.compile_mode == "auto":
        values["processing.compile_mode"] = "none"  # a trial may come out differently on every rank
    return config.with_values(values)


def _part(size: str | int, parts: int) -> str | int:
    if isinstance(size, str) and size.endswith("%"):
        return f"{float(size[:-1]) / parts:f}%"
    return parse_size(size) // parts


def form_team(
    config: Config, ranks: Ranks, build: Callable[[int], MemoryGovernor], progress: Callable[[], None]
) -> tuple[Team, MemoryGovernor]:
    """How the ranks share the model, and the governor for it; `build` gives one for a model over so many ranks.

    `distributed.strategy: auto` gives every rank the whole model where it fits easily. Raises: ConfigError for what a
    shared model cannot do, MemoryLimitError.
    """
    if not ranks.several:
        return Team(ranks), build(1)
    strategy, reason = config.distributed.strategy, "distributed.strategy"
    parts = ranks.size // config.distributed.replicas
    fault = _can_share(config)
    governor = build(parts if strategy != "replicate" and fault is None else 1)
    if strategy == "auto":
        plan = governor.plan
        whole = plan.weights + plan.adapters + plan.gradients + plan.optimizer
        tight = fault is None and ranks.any(parts * whole > _ROOMY * governor.limit_bytes)
        strategy, reason = ("shard" if tight else "replicate"), f"by the plan; {reason}"
        governor = governor if tight or fault else build(1)
    if strategy == "shard" and fault is not None:
        raise ConfigError(f"{fault[1]} cannot be shared out over ranks", where=fault[0],
                          fix="set distributed.strategy: replicate")  # fmt: skip
    how = f"the model in {parts} parts" if strategy == "shard" else "each with the whole model"
    logger.info("%d ranks, %s (%s)", ranks.size, how, reason)
    return Team(ranks, cast(Strategy, strategy), progress), governor


def _can_share(config: Config) -> tuple[str, str] | None:
    """The setting that FSDP2 cannot follow here, and what it is; None where it can."""
    if config.training.method in ("qlora", "qat"):
        return "training.method", f"the method {config.training.method}"
    if config.optimization.optimizer not in ("adamw", "sgd"):
        return "optimization.optimizer", f"the state of {config.optimization.optimizer}"
    if config.processing.precision == "fp16":
        return "processing.precision", "fp16's scaled loss"
    if config.processing.compile_mode not in ("none", "auto"):
        return "processing.compile_mode", "compiled layers"
    return None


def share_out(model: Any, config: Config, team: Team, precision: Precision) -> Enter | None:
    """Give this rank its part of the model under `shard`; returns how to call into it, else None."""
    if team.strategy != "shard":
        return None
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    mesh = build_mesh(team.ranks.device, team.ranks.size, config.distributed.replicas)
    full = config.training.method == "full"
    enter = share_model(causal, mesh, config, precision, trained=torch.float32 if full else None)
    if full:
        causal.config.dtype = torch.float32
    return enter


def share_model(
    causal: Any, mesh: Any, config: Config, precision: Precision, *, trained: torch.dtype | None = None
) -> Enter:
    """`shard_model` as the configuration says, layer by layer; weights are brought to the type `trained` first."""
    lowers = config.training.method == "full" and precision.lowers
    return shard_model(
        causal, decoder_layers(causal), mesh, compute=precision.compute if lowers else None, trained=trained,
        reshard=config.distributed.reshard,
    )  # fmt: skip


def stored_dtype(architecture: Mapping[str, Any], fallback: torch.dtype) -> torch.dtype:
    """The type of the weights in the model's files: loaded so, they stay mapped until a rank takes its part."""
    found = getattr(torch, str(architecture.get("dtype") or architecture.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else fallback


def explained(error: BaseException, place: Place, loop: TrainingLoop | None) -> BaseException:
    """What to report for an error in a run of several ranks: the cause, which may be in another rank.

    Every rank leaves its fault in the run's folder; one that only saw its peers go waits for theirs. An out-of-memory
    under FSDP leaves a smaller budget for the restart.
    """
    ranks, run = place.ranks, place.folder.path
    if not ranks.several:
        return error
    if loop is not None and loop.governor is not None and loop.team.in_lockstep and is_oom(error):
        tokens = keep_smaller_budget(run, loop.governor.token_budget)
        logger.warning("rank %d is out of memory; a restart takes at most %d tokens", ranks.rank, tokens)
    if not is_peer_failure(error):
        code = error.exit_code if isinstance(error, LlamaHomeError) else 1
        text = f"rank {ranks.rank}: {str(error) or type(error).__name__}"
        if not isinstance(error, DistributedError):
            write_json(_failure_file(run, ranks), {"code": code, "message": text, "at": time.time()})
        return error
    found = _first_failure(run, ranks) or _gone(place)
    cause = DistributedError(found or f"another rank went away: {_line(error)}",
                             fix="torchrun --max-restarts goes on from the newest checkpoint")  # fmt: skip
    blamed = not ranks.is_main and found is not None and found.startswith("rank 0")
    if blamed and read_json(run / STATUS_FILE).get("state") == "running":
        _write_failure(run, str(cause))
    return cause.with_traceback(error.__traceback__)


def _first_failure(run: Path, ranks: Ranks) -> str | None:
    """What the rank that failed first has written, within a few seconds."""
    deadline = time.monotonic() + _PEERS_SECONDS
    while time.monotonic() < deadline:
        faults = [json.loads(path.read_bytes()) for path in run.glob(f"{_FAILURES}/{_attempt(ranks)}-*.json")]
        if faults:
            return str(min(faults, key=lambda fault: float(fault["at"]))["message"])
        time.sleep(0.2)
    return None


def _gone(place: Place) -> str | None:
    silent = place.watchdog.silent() if place.watchdog else []
    return f"rank {', '.join(map(str, silent))} died without a word" if silent else None


def _failure_file(run: Path, ranks: Ranks) -> Path:
    folder = run / _FAILURES
    folder.mkdir(exist_ok=True)
    return folder / f"{_attempt(ranks)}-rank-{ranks.rank}.json"


def _attempt(ranks: Ranks) -> str:
    return f"{os.environ.get('MASTER_PORT', '0')}-{ranks.restarts}"


def _write_failure(run: Path, message: str) -> None:
    """status.json written by a rank other than the one that should, because that one is gone or hangs."""
    before = read_json(run / STATUS_FILE)
    content = {
        "state": "failed", "code": DistributedError.exit_code, "message": message,
        "last_step": before.get("last_step", 0), "resumable": any(run.glob("checkpoint-*")),
        "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
    write_json(run / STATUS_FILE, content)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
