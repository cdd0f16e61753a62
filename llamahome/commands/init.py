"""`llamahome init`: a short configuration for this machine and these data; and the shell's completion of commands."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamahome.commands.options import base_model, load_config, print_line, settings
from llamahome.errors import DataError, UsageError

if TYPE_CHECKING:
    from llamahome.config import Config
    from llamahome.data.report import DataReport

logger = logging.getLogger(__name__)
FILE = "llamahome.yaml"
_SHORTEST, _LONGEST = 128, 2048  # bounds of data.max_length that is chosen by the data
_FEW_STEPS = 60  # an epoch of fewer steps is gone through more than once
_HEAD = """\
# Written by `llamahome init` for this machine and these data. Train with it:
#   llamahome train --config {file}
# Only the checks before the first step: the same with --dry-run. Every setting there is: llamahome init --all.
"""


@dataclass(frozen=True)
class Choice:
    """A setting, its value, and in some words why."""

    section: str
    key: str
    value: object
    why: str


@click.command(short_help="Write a commented configuration for this machine.")
@click.argument("data", required=False)
@click.option("--model", help="Base model: folder, GGUF file or hub id [default: the embedded SmolLM2-135M].")
@click.option("--output", type=click.Path(path_type=Path), default=Path(FILE), show_default=True, help="File to write.")
@click.option("--all", "everything", is_flag=True, help="Write every setting, explained, not only those that matter.")
@settings
def init(data: str | None, model: str | None, output: Path, everything: bool, **given: Any) -> None:
    """Write a commented configuration for this machine and DATA (file, folder, glob or hub id)."""
    from llamahome.files import storage_errors, write_atomic
    from llamahome.monitor.words import program

    if output.exists():
        raise UsageError("there is a file already", where=str(output), fix="name another --output, or delete it")
    paths = {"data.path": data} if data is not None else {}
    config = load_config(given, {**base_model(model), **paths})
    chosen = list(choose(config))
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, whole_file(chosen, output) if everything else short_file(chosen, output))
    print_line(f"{output} written; train with: {program()} train --config {output}")


def choose(config: Config) -> Iterator[Choice]:
    """The settings that matter for a first run. Raises: DataError, ModelError where the data cannot be looked at."""
    from llamahome.data.prepare import check
    from llamahome.model.load import load_tokenizer, resolve_model

    report = None
    if config.data.path is not None:
        tokenizer = load_tokenizer(resolve_model(None, config.model, config.cache.dir))
        report = check(config.data.path, tokenizer, config=config)
        if not report.train.samples:
            raise DataError("nothing to train on", where=config.data.path,
                            fix=f"see the faults with: llamahome data check {config.data.path}")  # fmt: skip
        if report.faults:
            logger.warning("%d faulty rows; see them with: llamahome data check %s", len(report.faults),
                           config.data.path)  # fmt: skip
    yield from _of_data(config, report)
    yield from _of_model(config)
    yield from _of_optimization(config, report)
    yield from _of_machine(config)


def short_file(chosen: list[Choice], file: Path) -> str:
    """The chosen settings by section, each below its reason."""
    lines = [_HEAD.format(file=file)]
    for section in dict.fromkeys(choice.section for choice in chosen):
        lines.append(f"\n{section}:\n")
        for choice in chosen:
            if choice.section == section:
                off = "# " if choice.value is None else ""
                lines.append(f"  # {choice.why}\n  {off}{choice.key}: {json.dumps(choice.value)}\n")
    return "".join(lines)


def whole_file(chosen: list[Choice], file: Path) -> str:
    """Every setting with its explanation; the chosen ones have their values."""
    from llamahome.config.reference import annotated

    values: dict[str, dict[str, object]] = {}
    for choice in chosen:
        values.setdefault(choice.section, {})[choice.key] = choice.value
    text = annotated(values)
    return _HEAD.format(file=file) + text[text.index("\ncache:") :]


def _of_data(config: Config, report: DataReport | None) -> Iterator[Choice]:
    from llamahome.data.report import schema_names

    if report is None:
        yield Choice(
            "data", "path", None, "File, folder, glob or hub id to train on; without it the built-in examples."
        )
        return
    held_out = f", {report.validation.samples:,} are held out" if report.validation.samples else ""
    schemas = schema_names(report.schemas.values()) or "none"
    yield Choice("data", "path", config.data.path, f"{report.train.samples:,} samples to train on{held_out}; schema: "
                 f"{schemas}.")  # fmt: skip
    longest = report.longest[0]
    bound = min(_LONGEST, max(_SHORTEST, 1 << max(longest - 1, 0).bit_length()))
    rest = "nothing is cut" if longest <= bound else "longer ones are cut (data.overflow)"
    yield Choice("data", "max_length", bound, f"Tokens; the longest sample has {longest:,}: {rest}.")
    yield Choice("data", "train_on", config.data.train_on, "Whose tokens count in the loss: assistant or all.")


def _of_model(config: Config) -> Iterator[Choice]:
    if config.model.name is not None:
        yield Choice("model", "name", config.model.name, "Folder, GGUF file or hub id.")
    else:
        yield Choice("model", "name", None, "Folder, GGUF file or hub id; without it SmolLM2-135M-Instruct, built in.")


def _of_optimization(config: Config, report: DataReport | None) -> Iterator[Choice]:
    samples = config.global_batch_size()
    steps = -(-report.train.samples // samples) if report else None
    epochs = 3 if steps is not None and steps < _FEW_STEPS else config.training.epochs
    of_epoch = f"{steps:,} steps of {samples} samples each" if steps is not None else f"steps of {samples} samples"
    yield Choice("training", "epochs", epochs, f"Passes over the data, {of_epoch}.")
    yield Choice("training", "method", config.training.method, "lora, qlora (4 bits), full or qat.")
    yield Choice("training", "output", f"output/{_stem(config.data.path)}", "A folder of its own for each run.")
    if config.training.method in ("lora", "qlora"):
        yield Choice("optimization", "learning_rate", 2e-4, "Usual for LoRA; training all weights wants a tenth of it.")
    yield Choice("optimization", "global_batch_size", samples, "Samples per optimizer step; memory never changes it.")


def _of_machine(config: Config) -> Iterator[Choice]:
    from llamahome.memory.monitor import MemoryMonitor, format_bytes, resolve_limit
    from llamahome.training.host import usable_cores
    from llamahome.training.precision import resolve_precision
    from llamahome.training.setup import resolve_device

    device = resolve_device(config)
    limit = resolve_limit(config, str(device), MemoryMonitor(str(device)))
    yield Choice("training", "memory_limit", config.training.memory_limit, f"{format_bytes(limit)} on this machine; or "
                 "a size such as 8GB.")  # fmt: skip
    yield Choice("processing", "device", config.processing.device, f"{device} on this machine.")
    precision = resolve_precision(config, device).name
    yield Choice("processing", "precision", config.processing.precision, f"{precision} on this machine.")
    yield Choice("processing", "threads", config.processing.threads, f"{usable_cores()} usable cores on this machine.")


def _stem(path: str | None) -> str:
    """A folder's name from that of the data: `my data.csv` gives my-data."""
    words = "".join(letter if letter.isalnum() else " " for letter in Path(path or "training").stem).split()
    return "-".join(words) or "training"


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL; `eval "$(llamahome completion bash)"` in ~/.bashrc turns it on."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    print_line(found(context.find_root().command, {}, "llamahome", "_LLAMAHOME_COMPLETE").source())
