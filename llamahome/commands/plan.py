"""`llamahome plan`: what a run will need, before anything is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamahome.commands.options import base_model, load_config, print_line, settings

if TYPE_CHECKING:
    from llamahome.config import Config
    from llamahome.memory.ladder import Machine, Workload
    from llamahome.memory.outlook import Outlook
    from llamahome.memory.plan import MemoryPlan

_BAR = 40
_MEANINGS = {
    "weights": "the base model",
    "adapters": "LoRA's weights",
    "gradients": "of what is trained",
    "optimizer": "its moments",
    "activations": "kept for backward",
    "loss": "logits of one chunk",
    "allocator": "held between tensors",
    "overhead": "the process itself",
    "gathered": "whole layers from all ranks",
    "reader": "steps read ahead",
    "compile_scratch": "the compiler's",
}


@click.command(short_help="What training will need: memory by part, cut and time.")
@click.argument("data", required=False)
@click.option("--tokens", type=click.IntRange(1), help="Tokens of the data, instead of DATA: nothing is read.")
@click.option("--model", help="Base model; its config.json is enough [default: the embedded SmolLM2-135M].")
@click.option("--gpus", type=click.IntRange(1), help="Plan for so many GPUs that share the model (FSDP2).")
@click.option("--gpu-memory", metavar="SIZE", help="Memory of each GPU, such as 24GB.")
@click.option("--confirm", is_flag=True, help="Run the model's code with tensors that hold nothing, and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@settings
def plan(
    data: str | None, tokens: int | None, model: str | None, gpus: int | None, gpu_memory: str | None, confirm: bool,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """The memory that training on DATA needs, part by part, the cut, and the time; no weights are read."""
    from llamahome.memory.outlook import look_ahead
    from llamahome.model.fuse import knows

    if (data is None) == (tokens is None):
        raise click.UsageError("name DATA or --tokens")
    if gpus and not gpu_memory:
        raise click.UsageError("--gpus needs --gpu-memory, such as 24GB")
    config = load_config(given, base_model(model))
    architecture = _architecture(config)
    machine, precision = _machine(config, gpu_memory, gpus or 1)
    work = _samples(config, data) if data is not None else _tokens(config, tokens or 0)
    fused = config.processing.fuse and knows(architecture.get("model_type"))
    outlook = look_ahead(architecture, config, machine, work, precision=precision, fused=fused)
    traced = _trace(config, architecture, outlook, precision) if confirm else None
    if as_json:
        print_line(json.dumps(_facts(outlook, work, traced)))
    else:
        _show(outlook, work, traced)
    if not outlook.fits:
        raise click.exceptions.Exit(5)


def _trace(config: Config, architecture: dict[str, Any], outlook: Outlook, precision: str) -> int:
    """Bytes of the plan's tensors by the model's own code."""
    from llamahome.model.quiet import quiet_transformers
    from llamahome.training.confirm import traced_bytes
    from llamahome.training.precision import Precision

    plan, machine = outlook.plan, outlook.machine
    with quiet_transformers():
        # Fake tensors of a GPU abort a build without CUDA, and sizes do not depend on the device.
        return traced_bytes(
            architecture, config, Precision(precision, "cpu"), tokens=plan.micro_batch_tokens,  # type: ignore[arg-type]
            checkpointing=plan.gradient_checkpointing, recompute_mlp=plan.recompute_mlp, ranks=machine.ranks,
            replicas=machine.replicas,
        )  # fmt: skip


def _architecture(config: Config) -> dict[str, Any]:
    """The content of the model's config.json; a hub id must be in the local cache."""
    from llamahome.model.checks import read_json
    from llamahome.model.load import resolve_model

    name = config.model.name
    if name is not None and not Path(name).expanduser().exists() and name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json", revision=config.model.revision)
        if isinstance(found, str):
            return read_json(Path(found))
    return read_json(resolve_model(None, config.model, config.cache.dir).folder / "config.json")


def _machine(config: Config, gpu_memory: str | None, gpus: int) -> tuple[Machine, str]:
    """The machine and the precision: GPUs of a given size, or the device of this machine with its measured speed."""
    import torch

    from llamahome.config.sizes import parse_size
    from llamahome.errors import ConfigError
    from llamahome.memory.ladder import Machine
    from llamahome.memory.monitor import MemoryMonitor, limit_of
    from llamahome.memory.outlook import datasheet
    from llamahome.monitor.tracker import measure_matmul_peak
    from llamahome.training.precision import resolve_precision
    from llamahome.training.setup import resolve_device

    if gpu_memory:
        total = parse_size(gpu_memory)
        asked = config.processing.precision
        name, flops = datasheet(total / 1e9) or ("unknown", None)
        speed = f"if 35 % of the data sheet of one {name} are reached" if flops else "unknown"
        precision = "bf16" if asked == "auto" else asked
        replicas = config.distributed.replicas
        if gpus % replicas:
            raise ConfigError(f"{gpus} GPUs cannot be divided by {replicas}", where="distributed.replicas",
                              fix="choose a divisor of --gpus")  # fmt: skip
        limit = limit_of(config, "cuda", total)[1]
        return Machine("cuda", limit, gpus // replicas, flops, speed, replicas=replicas), precision
    device = resolve_device(config)
    precision = resolve_precision(config, torch.device(device)).name
    total = MemoryMonitor(str(device)).read().total_bytes
    share = "45 %" if device.type == "cpu" else "35 %"
    peak = measure_matmul_peak(precision, str(device))
    speed = f"if {share} of the speed of matrix products measured here are reached"
    return Machine(device.type, limit_of(config, device.type, total)[1], 1, peak, speed), precision


def _samples(config: Config, data: str) -> Workload:
    """Lengths of the real samples; they are tokenised as the run would, into the cache."""
    from llamahome.data.prepare import prepare
    from llamahome.model.load import load_tokenizer, resolve_model
    from llamahome.training.budget import workload

    tokenizer = load_tokenizer(resolve_model(None, config.model, config.cache.dir))
    prepared = prepare(data, tokenizer, config=config)
    try:
        store, per_step = prepared.train, config.global_batch_size()
        steps = config.optimization.max_steps or config.training.epochs * -(-len(store) // per_step)
        return workload(store, per_step, steps)
    finally:
        prepared.close()


def _tokens(config: Config, tokens: int) -> Workload:
    """So many tokens in samples of the greatest length, all of them trained."""
    from llamahome.memory.ladder import Workload

    longest = config.data.max_length
    return Workload(longest, longest * config.global_batch_size(), tokens * config.training.epochs)


def _facts(outlook: Outlook, work: Workload, traced: int | None) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **outlook.plan.to_dict(),
        **asdict(work),
        "limit_bytes": outlook.machine.limit_bytes,
        "minimum_bytes": outlook.minimum_bytes,
        "fits": outlook.fits,
        "turned_on": list(outlook.turned_on),
        "advice": list(outlook.advice),
        "ranks": outlook.machine.processes,
        "seconds": outlook.seconds,
        "recompute": {name: asdict(part) for name, part in outlook.recompute.items()},
        "speed": outlook.machine.speed,
        "traced_bytes": traced,
        "comparable_bytes": comparable(outlook.plan),
    }


def comparable(plan: MemoryPlan) -> int:
    """The part of a plan that a trace sees: tensors alone, without the loss's buffers."""
    from dataclasses import replace

    from llamahome.memory.plan import RUNTIME_BYTES

    bare = replace(plan, loss_row_bytes=0, loss_constant=0, reader=0, compile_scratch=0)
    return bare.live - min(RUNTIME_BYTES.values(), key=lambda size: abs(bare.overhead - size))


def _show(outlook: Outlook, work: Workload, traced: int | None) -> None:
    rows = list(_rows(outlook.plan))
    if sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Column, Table

        table = Table("part", Column("bytes", justify="right"), "what")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        for name, size, meaning in rows:
            print_line(f"{name:16} {size:>8}  {meaning}")
    for line in _lines(outlook, work, traced):
        print_line(line)


def _rows(plan: MemoryPlan) -> Iterator[tuple[str, str, str]]:
    from llamahome.memory.monitor import format_bytes

    parts = plan.to_dict()
    for name, meaning in _MEANINGS.items():
        if parts[name]:
            yield name.replace("_", " "), format_bytes(parts[name]), meaning
    yield "total", format_bytes(plan.total), f"{plan.micro_batch_tokens:,} tokens in a micro-batch"


def _lines(outlook: Outlook, work: Workload, traced: int | None) -> Iterator[str]:
    from llamahome.memory.monitor import format_bytes
    from llamahome.monitor.words import bar

    plan, limit = outlook.plan, outlook.machine.limit_bytes
    count = outlook.machine.processes
    ranks = f" on each of {count} GPUs" if count > 1 else ""
    yield f"{bar(plan.total / limit, _BAR)} {format_bytes(plan.total)} of {format_bytes(limit)}{ranks}"
    yield f"longest sample {work.longest:,} tokens; {work.tokens:,} tokens in all"
    yield _per_layer(outlook)
    if outlook.turned_on:
        yield f"memory is short: {', '.join(outlook.turned_on)}"
    if outlook.fits:
        yield f"fits; the smallest limit that would do is {format_bytes(outlook.minimum_bytes)}"
    else:
        advice = [f"training.memory_limit of {format_bytes(outlook.minimum_bytes)}", *outlook.advice]
        yield f"does not fit: {', or '.join(advice)}"
    if outlook.seconds is not None:
        yield f"about {_duration(outlook.seconds)} ({outlook.machine.speed})"
    if traced is not None:
        ours = comparable(plan)
        yield f"traced {format_bytes(traced)} of tensors, {format_bytes(ours)} by formula: {ours / traced - 1:+.1%}"
        if plan.offload:
            yield "the trace leaves on the GPU what the plan moves to host memory"


def _per_layer(outlook: Outlook) -> str:
    saves = {name: f"{part.bytes_per_kiloflop:.2f}" for name, part in outlook.recompute.items()}
    mlp = f", its MLP {saves['mlp']}" if "mlp" in saves else ""
    kept = f"{outlook.plan.layer_bytes_per_token:,} bytes a token"
    return f"a layer keeps {kept}; computed again it saves {saves['layer']} per 1,000 operations{mlp}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    whole = max(1, round(seconds))
    return f"{whole} second" + "s" * (whole != 1)
