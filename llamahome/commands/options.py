"""What the commands share: options of every command with a configuration, and lines for a person."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

if TYPE_CHECKING:
    from llamahome.config import Config

F = TypeVar("F", bound=Callable[..., Any])


def settings(command: F) -> F:
    """Options that every command with a configuration shares."""
    options = (
        click.option("--config", "config_file", type=click.Path(path_type=Path), help="Configuration file (YAML)."),
        click.option("--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change one setting."),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
        click.option("--allow-pickle", is_flag=True, help="Load weights that are not safetensors."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def load_config(given: Mapping[str, Any], values: Mapping[str, object] | None = None) -> Config:
    """The configuration: defaults, then the file, then the command line."""
    from llamahome.config import Config

    arguments = [f"{key}={json.dumps(value)}" for key, value in (values or {}).items()]
    return Config.load(given["config_file"], [*changes(given), *arguments])


def base_model(model: str | None) -> dict[str, object]:
    """The setting behind `--model`."""
    return {"model.name": model} if model is not None else {}


def changes(given: Mapping[str, Any]) -> list[str]:
    """`key=value` of each `--set`, and of the flags that are settings."""
    flags = [f"model.{name}=true" for name in ("trust_remote_code", "allow_pickle") if given[name]]
    return [*given["overrides"], *flags]


def print_line(line: str, stream: TextIO | None = None) -> None:
    """A line for whoever still reads; nobody's absence stops a run."""
    stream = stream or sys.stdout
    try:
        stream.write(line + "\n")
        stream.flush()
    except (AttributeError, OSError, ValueError):  # no stream, a closed one, or nobody at its other end
        return


def print_error(line: str) -> None:
    """The same on stderr."""
    print_line(line, sys.stderr)
