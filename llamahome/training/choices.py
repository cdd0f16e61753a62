"""The choices that were made for a run, one in a line, each with the setting that changes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llamahome.config import Config
from llamahome.data.report import schema_names
from llamahome.memory.monitor import format_bytes
from llamahome.memory.plan import MemoryPlan
from llamahome.training.precision import Precision

_EMBEDDED = "SmolLM2-135M-Instruct, built in"


def chosen(precision: Precision, mode: str, plan: MemoryPlan) -> dict[str, Any]:
    """What stood for `auto`, by the setting's name; a resumed run keeps it."""
    return {
        "processing.precision": precision.name,
        "processing.compile_mode": mode,
        "processing.gradient_checkpointing": "mlp" if plan.recompute_mlp else plan.gradient_checkpointing,
        "processing.loss_chunk": plan.loss_rows,
    }


def choices(config: Config, facts: Mapping[str, Any]) -> Iterator[str]:
    """Lines for a person; `facts` are those of run.json."""
    for name, value, settings in _choices(config, facts):
        yield f"{name:9} {value} ({', '.join(settings)})"


def _choices(config: Config, facts: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name, what was chosen, the settings that change it)."""
    data = facts.get("data")
    if isinstance(data, dict) and data["schemas"]:
        whose = "all tokens" if config.data.train_on == "all" else "the assistant's tokens"
        schemas = schema_names(data["schemas"].values())
        yield "schema", f"{schemas}, {whose} are trained", ("data.fields", "data.train_on")
    yield "model", str(config.model.name or _EMBEDDED), ("--model", "model.name")
    trained = facts["trainable_parameters"] / 1e6
    yield "method", f"{config.training.method}, {trained:.2f} million trained parameters", ("training.method",)
    device = "CPU" if facts["device"] == "cpu" else f"{facts['device']}, CPU"
    yield (
        "device",
        f"{device} with {_count(facts['threads'], 'thread')}",
        ("processing.device", "processing.threads"),
    )
    yield "precision", str(facts["precision"]), ("processing.precision",)
    yield "compile", str(facts["compile_mode"]), ("processing.compile_mode",)
    steps = f"{_count(facts['total_steps'], 'step')} of {_count(facts['samples_per_step'], 'sample')}"
    yield "length", steps, ("optimization.max_steps", "optimization.global_batch_size")
    plan = facts["memory_plan"]
    limit = format_bytes(facts["memory_limit_bytes"])
    yield "memory", f"limit {limit}, {format_bytes(plan['total'])} planned", ("training.memory_limit",)
    cut = f"micro-batches of up to {plan['micro_batch_tokens']:,} tokens{_computed_again(plan)}"
    yield "cut", cut, ("training.batch_size",)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _computed_again(plan: Mapping[str, Any]) -> str:
    layers = plan.get("gradient_checkpointing", False)
    if isinstance(layers, bool):
        return ", activations computed again" if layers else ""
    return f", activations of the first {_count(layers, 'layer')} computed again"
