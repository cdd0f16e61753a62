"""`llamahome import-config`: a configuration of torchtune, Axolotl or LLaMA-Factory, written as one of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from llamahome.commands.foreign_configs import KNOWN, Foreign, Settings
from llamahome.commands.options import print_error, print_line
from llamahome.errors import ConfigError, UsageError

_DEVICES = "samples per step on one device; multiply by the number of devices that it ran on"


@dataclass
class Imported:
    """Settings of ours by dotted key; of theirs what needs none, and what could not be carried over, with reasons."""

    settings: Settings = field(default_factory=dict)
    not_needed: dict[str, str] = field(default_factory=dict)
    not_carried: dict[str, str] = field(default_factory=dict)


@click.command("import-config", short_help="Take over a configuration of another trainer.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), default=Path("llamahome.yaml"), show_default=True,
              help="File to write.")  # fmt: skip
def import_config(file: Path, output: Path) -> None:
    """Write the configuration FILE of torchtune, Axolotl or LLaMA-Factory as one of ours; list what is left out."""
    from llamahome.files import storage_errors, write_atomic
    from llamahome.monitor.words import program as typed

    if output.exists():
        raise UsageError("there is a file already", where=str(output), fix="name another --output, or delete it")
    program, found = read_foreign(file)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, as_yaml(program, file, found))
    for key, reason in found.not_needed.items():
        print_line(f"not needed: {key}: {reason}")
    for key, reason in found.not_carried.items():
        print_error(f"not carried over: {key}: {reason}")
    print_line(f"{output} written from {program.name}'s {file}: {len(found.settings)} settings, "
               f"{len(found.not_carried)} not carried over; train with: {typed()} train --config {output}")  # fmt: skip


def read_foreign(file: Path) -> tuple[Foreign, Imported]:
    """The program whose file it is, and its settings here.

    Raises: ConfigError for a file of none of the three, one that is no YAML, or values that our settings refuse.
    """
    from llamahome.config import Config
    from llamahome.config.yaml import read_document

    document = read_document(file).values
    flat = dict(_flatten(document))
    program = next((one for one in KNOWN if any(mark in flat for mark in one.marks)), None)
    if program is None:
        raise ConfigError("not a configuration of torchtune, Axolotl or LLaMA-Factory", where=str(file),
                          fix="name the YAML file that one of them trains with")  # fmt: skip
    found = translate(program, flat)
    try:
        Config.load(None, found.settings)
    except ConfigError as error:
        raise ConfigError(f"{program.name}'s values are not possible here: {error.what}", where=str(file),
                          fix=error.fix or "change them in the file") from error  # fmt: skip
    return program, found


def translate(program: Foreign, flat: Mapping[str, Any]) -> Imported:
    """Every key of `flat` by the program's rules; keys without a value say nothing."""
    found = Imported()
    for key, raw in flat.items():
        value = _resolved(raw, flat)
        if value is None or value in ({}, []):
            continue
        rule = program.rules.get(key)
        if rule is None:
            found.not_carried[key] = "no setting for it"
            continue
        result = {rule: value} if isinstance(rule, str) else rule(value)
        if isinstance(result, str):
            found.not_carried[key] = result
        elif "" in result:
            found.not_needed[key] = str(result[""])
        else:
            _add(found.settings, result)
    _complete(found.settings, program.defaults)
    return found


def as_yaml(program: Foreign, file: Path, found: Imported) -> str:
    """The settings by section, and as comments what was not carried over."""
    lines = [f"# From {program.name}'s {file.name}, by `llamahome import-config`."]
    lines += [f"# Not carried over: {key}: {reason}" for key, reason in found.not_carried.items()]
    for section in sorted({key.split(".")[0] for key in found.settings}):
        lines.append(f"\n{section}:")
        for key, value in found.settings.items():
            if key.startswith(f"{section}."):
                note = f"  # {_DEVICES}" if key == "optimization.global_batch_size" else ""
                lines.append(f"  {key.split('.', 1)[1]}: {json.dumps(value)}{note}")
    return "\n".join(lines) + "\n"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _resolved(value: Any, flat: Mapping[str, Any]) -> Any:
    """torchtune's `${key}`, filled in with the key's own value."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{([\w.]+)\}", lambda found: str(flat.get(found[1], found[0])), value)


def _add(settings: Settings, result: Mapping[str, object]) -> None:
    """Take a rule's settings; `key+` adds to a list, `key[i]` sets one of a pair, qlora is more than lora."""
    for key, value in result.items():
        if key.endswith("+"):
            before = settings.get(key[:-1], [])
            settings[key[:-1]] = [*before, *value] if isinstance(before, list) and isinstance(value, list) else before
        elif key.endswith("]"):
            pair = settings.setdefault(key[:-3], [0.9, 0.999])
            assert isinstance(pair, list)
            pair[int(key[-2])] = value
        elif key != "training.method" or settings.get(key) != "qlora":
            settings[key] = value


def _complete(settings: Settings, defaults: Mapping[str, object]) -> None:
    """Say what the other program means where its file says nothing; samples per step in place of how they are cut."""
    adapter = settings.get("training.method", defaults.get("training.method")) in ("lora", "qlora")
    for key, value in defaults.items():
        if adapter or not key.startswith("lora."):
            settings.setdefault(key, value)
    if settings.get("lora.alpha") == "2r":
        settings["lora.alpha"] = 2 * int(str(settings["lora.rank"]))
    if not adapter:
        for key in [key for key in settings if key.startswith("lora.")]:
            del settings[key]
    samples = int(str(settings.pop("training.batch_size"))) * int(str(settings.pop("training.gradient_accumulation")))
    settings["optimization.global_batch_size"] = samples
