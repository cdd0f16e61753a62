"""What is tried, in this order, when the longest sample does not fit: nothing here changes the mathematics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llamahome.memory.plan import MemoryPlan, default_loss_rows, plan_memory
from llamahome.memory.recompute import in_order_of_cost
from llamahome.memory.shape import ModelShape, model_shape

if TYPE_CHECKING:
    from llamahome.config import Config

logger = logging.getLogger(__name__)
SMALL_LOSS_CHUNK = 128


@dataclass(frozen=True)
class Workload:
    """The samples: tokens of the longest, of the largest step and of the whole run, and the share that is trained."""

    longest: int
    step_tokens: int
    tokens: int
    trained_fraction: float = 1.0


@dataclass(frozen=True)
class Machine:
    """What a rank runs on. `peak_flops` None: unknown; `speed` says where it is from.

    `ranks` share a model, and each of the `replicas` is so many ranks.
    `process_bytes`: what the process holds before the model is loaded, where it is there to be asked.
    """

    device: str
    limit_bytes: int
    ranks: int = 1
    peak_flops: float | None = None
    speed: str = "unknown"
    process_bytes: int | None = None
    replicas: int = 1

    @property
    def processes(self) -> int:
        """The ranks of all replicas."""
        return self.ranks * self.replicas


@dataclass(frozen=True)
class Rung:
    """Settings that save memory and cost time. `gradient_checkpointing`: no layer, all, or so many of the first."""

    loss_chunk: int
    recompute_mlp: bool = False
    gradient_checkpointing: bool | int = False
    offload: bool = False

    def __str__(self) -> str:
        """Only what is spent: for a line that says what was turned on."""
        words = [f"processing.loss_chunk {self.loss_chunk}"]
        words += ["the MLP's products made again in backward"] * self.recompute_mlp
        if self.gradient_checkpointing:
            words.append(f"processing.gradient_checkpointing {as_setting(self.gradient_checkpointing)}")
        return ", ".join([*words, *["kept activations in host memory"] * self.offload])


@dataclass(frozen=True)
class Choice:
    """The plan of the first rung that fits, or else of the last; those of the first and the last rung beside it."""

    plan: MemoryPlan
    asked: MemoryPlan
    smallest: MemoryPlan


def choose_plan(
    architecture: Any, config: Config, machine: Machine, work: Workload, *, precision: str, fused: bool,
    compiled: bool = False,
) -> Choice:  # fmt: skip
    """Plan a run by the model's configuration and climb the ladder as far as `machine` asks for.

    `fused`: the layers will be `llamahome.model.fuse`'s. Raises: ModelError for what is no decoder.
    """

    def build(rung: Rung) -> MemoryPlan:
        return plan_memory(
            architecture, method=config.training.method, lora=config.lora, precision=precision, max_length=work.longest,
            optimizer=config.optimization.optimizer, device=machine.device, trained_fraction=work.trained_fraction,
            fused=fused, ranks=machine.ranks, reshard=config.distributed.reshard, step_tokens=work.step_tokens,
            compiled=compiled, process_bytes=machine.process_bytes, **vars(rung),
        )  # fmt: skip

    chunk = config.processing.loss_chunk
    ladder = list(
        rungs(
            model_shape(architecture), loss_chunk=0 if chunk == "auto" else int(chunk), fused=fused,
            checkpointing=config.processing.gradient_checkpointing, device=machine.device,
        )
    )  # fmt: skip
    plan = climb(ladder, build, limit_bytes=machine.limit_bytes, longest_sample=work.longest)
    return Choice(plan, build(ladder[0]), build(ladder[-1]))


def rungs(
    shape: ModelShape, *, loss_chunk: int, checkpointing: bool | int | str, device: str, fused: bool = False
) -> Iterator[Rung]:
    """The ladder from the fastest settings to the smallest; what the user decided stays as it is.

    `loss_chunk` 0 and `checkpointing` "auto" are open: as few layers as will do are computed again, or the MLP's
    products of all, which only `fused` layers can do; what adds less arithmetic is tried first. Activations are moved
    out of a GPU's memory only: beside a CPU there is no other memory, and disks are too slow to hold what each layer
    keeps.
    """
    chunks = [loss_chunk] if loss_chunk else [default_loss_rows(shape.vocabulary, device), SMALL_LOSS_CHUNK]
    for chunk in dict.fromkeys(chunks):
        yield _rung(chunk, False if checkpointing == "auto" else checkpointing)
    if checkpointing == "auto":
        for value in (*in_order_of_cost(shape, fused=fused), True):
            yield _rung(chunks[-1], value)
    if device.partition(":")[0] == "cuda":
        yield replace(_rung(chunks[-1], True if checkpointing == "auto" else checkpointing), offload=True)


def _rung(chunk: int, checkpointing: bool | int | str) -> Rung:
    if isinstance(checkpointing, str):
        return Rung(chunk, recompute_mlp=checkpointing == "mlp")
    return Rung(chunk, gradient_checkpointing=checkpointing)


def as_setting(checkpointing: bool | int) -> str:
    """As it is written in a configuration."""
    return str(checkpointing).lower()


def climb(
    ladder: Sequence[Rung], build: Callable[[Rung], MemoryPlan], *, limit_bytes: int, longest_sample: int
) -> MemoryPlan:
    """The plan of the first rung with which the longest sample fits into `limit_bytes`, or else of the last rung."""
    plan = build(ladder[0])
    for number, rung in enumerate(ladder):
        plan = build(rung)
        if plan.at(longest_sample).total <= limit_bytes:
            if number:
                logger.info("memory is short: %s", rung)
            return plan
    return plan


def savings(plan: MemoryPlan, *, longest: int, missing: int) -> list[str]:
    """Settings that would make a plan fit, each for itself; `longest` tokens would, `missing` bytes are too many.

    These change what is trained or how long it takes, so they are advice and never taken by themselves.
    """
    advice = [f"set data.max_length to {longest // 16 * 16}"] if longest >= 64 else []
    if plan.gradient_checkpointing is not True:
        advice.append("set processing.gradient_checkpointing: true")
    if plan.adapters and plan.weights - plan.quantized_weights > missing:
        advice.append("set training.method: qlora")
    return advice
