"""What a plan means for a run: the cut, whether it fits, what would make it fit, and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamahome.config import Config
from llamahome.memory.flops import training_flops
from llamahome.memory.governor import AIM, ENOUGH_TOKENS, STEP
from llamahome.memory.ladder import Machine, Workload, as_setting, choose_plan, savings
from llamahome.memory.plan import MemoryPlan
from llamahome.memory.recompute import Part, parts
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
class Outlook:
    """A plan for a machine. `minimum_bytes` is the smallest limit that would do with every saving but shorter samples.

    `plan` is at the cut that the governor would begin with; `advice` holds settings that would make it fit; `recompute`
    says what a layer's parts save when they are computed again.
    """

    plan: MemoryPlan
    machine: Machine
    fits: bool
    minimum_bytes: int
    turned_on: tuple[str, ...]
    advice: tuple[str, ...]
    seconds: float | None
    recompute: Mapping[str, Part] = field(default_factory=dict)


def look_ahead(
    architecture: Any, config: Config, machine: Machine, work: Workload, *, precision: str, fused: bool
) -> Outlook:
    """Plan a run by the model's configuration alone, as `llamahome train` would."""
    choice = choose_plan(architecture, config, machine, work, precision=precision, fused=fused)
    most = max(work.longest, min(work.step_tokens, ENOUGH_TOKENS[machine.device]))
    cut = min(most, max(work.longest, choice.plan.max_tokens(AIM * machine.limit_bytes) // STEP * STEP))
    plan, fitting = choice.plan.at(cut), choice.plan.max_tokens(machine.limit_bytes)
    missing = plan.total - machine.limit_bytes
    return Outlook(
        plan=plan,
        machine=machine,
        fits=missing <= 0,
        minimum_bytes=choice.smallest.at(work.longest).total,
        turned_on=_turned_on(plan, choice.asked),
        advice=() if missing <= 0 else tuple(savings(plan, longest=fitting, missing=missing)),
        seconds=_seconds(architecture, config, machine, work, plan),
        recompute=parts(
            model_shape(architecture), config.lora, low=precision != "fp32", trains_base=config.trains_base, fused=fused
        ),
    )


def datasheet(memory_gb: float) -> tuple[str, float] | None:
    """(name, FLOP per second) of the usual GPU with so much memory; None where no card is near."""
    near = min(DATASHEETS, key=lambda size: abs(size - memory_gb))
    return DATASHEETS[near] if abs(near - memory_gb) <= 0.1 * near else None


def _turned_on(plan: MemoryPlan, asked: MemoryPlan) -> tuple[str, ...]:
    """Settings that the ladder changed."""
    words: Sequence[tuple[bool, str]] = (
        (plan.loss_rows != asked.loss_rows, f"processing.loss_chunk: {plan.loss_rows}"),
        (plan.recompute_mlp, "the MLP's products made again in backward"),
        (
            plan.gradient_checkpointing != asked.gradient_checkpointing,
            f"processing.gradient_checkpointing: {as_setting(plan.gradient_checkpointing)}",
        ),
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
    forward = 1 / 3 if trains_base else 1 / 2  # of a step's arithmetic, made once more
    mlp = 2 * shape.hidden * shape.mlp * shape.layers / one_expert.linear_parameters
    layers = 1.0 if plan.gradient_checkpointing is True else plan.gradient_checkpointing / shape.layers
    again = 1 + forward * (mlp if plan.recompute_mlp else layers)
    needed = again * flops.of(work.tokens, round(work.trained_fraction * work.tokens))
    return needed / (machine.peak_flops * REACHED[machine.device] * machine.processes)
