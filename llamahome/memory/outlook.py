"""What a plan means for a run: the cut, whether it fits, what would make it fit, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llamahome.config import Config
from llamahome.memory.flops import training_flops
from llamahome.memory.governor import ENOUGH_TOKENS
from llamahome.memory.ladder import Rung, climb, rungs, savings
from llamahome.memory.plan import MemoryPlan, plan_memory
from llamahome.memory.shape import model_shape

# Share of the matrix products' peak that training reaches. CPU: SmolLM2-135M on two cores here. GPU: torchtitan's
# published 33 to 39 % on H100; nothing of ours was measured on one.
REACHED = {"cpu": 0.45, "cuda": 0.35}
# Dense bf16 FLOP per second from the makers' data sheets, by memory in GB: the usual card of that size.
DATASHEETS = {
    16: ("T4, fp16", 65e12), 24: ("RTX 4090", 165e12), 40: ("A100", 312e12), 48: ("L40S", 362e12), 80: ("H100", 989e12),
    141: ("H200", 989e12), 192: ("B200", 2250e12),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """The samples: tokens of the longest, of the largest step and of the whole run, and the share that is trained."""

    longest: int
    step_tokens: int
    tokens: int
    trained_fraction: float = 1.0


@dataclass(frozen=True)
class Machine:
    """What a rank runs on. `peak_flops` None: unknown; `speed` says where it is from."""

    device: str
    limit_bytes: int
    ranks: int = 1
    peak_flops: float | None = None
    speed: str = "unknown"


@dataclass(frozen=True)
class Outlook:
    """A plan for a machine. `minimum_bytes` is the smallest limit that would do with every saving but shorter samples.

    `plan` is at the cut that the governor would begin with; `advice` holds settings that would make it fit.
    """

    plan: MemoryPlan
    machine: Machine
    fits: bool
    minimum_bytes: int
    turned_on: tuple[str, ...]
    advice: tuple[str, ...]
    seconds: float | None


def look_ahead(
    architecture: Any, config: Config, machine: Machine, work: Workload, *, precision: str, fused: bool
) -> Outlook:
    """Plan a run by the model's configuration alone, as `llamahome train` would."""

    def build(rung: Rung) -> MemoryPlan:
        return plan_memory(
            architecture, method=config.training.method, lora=config.lora, precision=precision, max_length=work.longest,
            optimizer=config.optimization.optimizer, device=machine.device, trained_fraction=work.trained_fraction,
            fused=fused, ranks=machine.ranks, step_tokens=work.step_tokens, **vars(rung),
        )  # fmt: skip

    chunk = config.processing.loss_chunk
    ladder = list(
        rungs(
            model_shape(architecture).vocabulary, loss_chunk=0 if chunk == "auto" else int(chunk),
            checkpointing=config.processing.gradient_checkpointing, device=machine.device,
        )
    )  # fmt: skip
    plan = climb(ladder, build, limit_bytes=machine.limit_bytes, longest_sample=work.longest)
    most = max(work.longest, min(work.step_tokens, ENOUGH_TOKENS[machine.device]))
    cut = min(most, max(work.longest, plan.max_tokens(0.95 * machine.limit_bytes) // 64 * 64))
    plan, fitting = plan.at(cut), plan.max_tokens(machine.limit_bytes)
    missing = plan.total - machine.limit_bytes
    fits, minimum = missing <= 0, build(ladder[-1]).at(work.longest).total
    return Outlook(
        plan=plan,
        machine=machine,
        fits=fits,
        minimum_bytes=minimum,
        turned_on=_turned_on(plan, build(ladder[0])),
        advice=() if fits else tuple(savings(plan, longest=fitting, missing=missing)),
        seconds=_seconds(architecture, config, machine, work, plan),
    )


def datasheet(memory_gb: float) -> tuple[str, float] | None:
    """(name, FLOP per second) of the usual GPU with so much memory; None where no card is near."""
    near = min(DATASHEETS, key=lambda size: abs(size - memory_gb))
    return DATASHEETS[near] if abs(near - memory_gb) <= 0.1 * near else None


def _turned_on(plan: MemoryPlan, asked: MemoryPlan) -> tuple[str, ...]:
    """Settings that the ladder changed."""
    words: Sequence[tuple[bool, str]] = (
        (plan.loss_rows != asked.loss_rows, f"processing.loss_chunk: {plan.loss_rows}"),
        (plan.gradient_checkpointing != asked.gradient_checkpointing, "processing.gradient_checkpointing: true"),
        (plan.offload, "kept activations in host memory"),
    )
    return tuple(word for changed, word in words if changed)


def _seconds(architecture: Any, config: Config, machine: Machine, work: Workload, plan: MemoryPlan) -> float | None:
    if not machine.peak_flops:
        return None
    shape, trains_base = model_shape(architecture), config.training.method in ("full", "qat")
    one_expert = replace(shape, experts=1, active_experts=1)  # `mlp` is that of the active ones
    adapters = 0 if trains_base else machine.ranks * plan.gradients // 4
    flops = training_flops(
        one_expert.linear_parameters, shape.vocabulary * shape.hidden, adapter_parameters=adapters,
        trains_base=trains_base,
    )  # fmt: skip
    again = (4 / 3 if trains_base else 3 / 2) if plan.gradient_checkpointing else 1.0
    needed = again * flops.of(work.tokens, round(work.trained_fraction * work.tokens))
    return needed / (machine.peak_flops * REACHED[machine.device] * machine.ranks)
