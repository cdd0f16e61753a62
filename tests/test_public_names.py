"""What others rely on. A change here changes the public contract: say so in CHANGELOG.md."""

from __future__ import annotations

from collections.abc import Iterator

import click

import llamahome
from llamahome.cli import cli

PUBLIC_NAMES = {
    "BatchProcessor", "Config", "DataManager", "MemoryGovernor", "MemoryMonitor", "MetricsCollector", "MicroBatch",
    "OOMHandler", "PerformanceTracker", "ResourceMonitor", "ResourceRecovery", "StepOrder", "StreamingDataset",
    "TokenStore", "TrainingLoop", "__version__", "errors", "evaluate", "fuse", "kernels", "plan_memory", "prepare",
    "train",
}  # fmt: skip
SETTINGS = {"--config", "--set", "--trust-remote-code", "--allow-pickle"}
COMMANDS = {
    "llamahome": {"--debug", "--version"},
    "llamahome train": {"DATA", "--model", "--output", "--eval-data", "--dry-run", "--nproc", "--json", *SETTINGS},
    "llamahome train-resume": {"CHECKPOINT", "--trust-run", "--nproc", "--json", *SETTINGS},
    "llamahome train-eval": {"MODEL", "DATA", "--output", "--model", "--json", *SETTINGS},
    "llamahome merge": {"ADAPTER", "--output", "--format", "--model", "--dtype", *SETTINGS},
    "llamahome chat": {"MODEL", "--prompt", "--system", "--max-new-tokens", "--temperature", "--model", *SETTINGS},
    "llamahome doctor": {"--json", *SETTINGS},
    "llamahome init": {"DATA", "--model", "--output", "--all", *SETTINGS},
    "llamahome import-config": {"FILE", "--output"},
    "llamahome completion": {"SHELL"},
    "llamahome report": {"RUNS", "--output"},
    "llamahome watch": {"RUN", "--interval"},
    "llamahome data": set(),
    "llamahome data check": {"PATH", "--model", "--json", *SETTINGS},
    "llamahome data prepare": {"PATH", "--output", "--eval-data", "--shard", "--model", *SETTINGS},
    "llamahome data verify": {"FOLDERS", "--cache", *SETTINGS},
    "llamahome plan": {"DATA", "--tokens", "--model", "--gpus", "--gpu-memory", "--confirm", "--json", *SETTINGS},
    "llamahome cache": set(),
    "llamahome cache ls": SETTINGS,
    "llamahome cache clear": SETTINGS,
}


def parameters(name: str, command: click.Command) -> Iterator[tuple[str, set[str]]]:
    """(command, its arguments and options) of a command and of all below it."""
    yield name, {option for parameter in command.params for option in option_names(parameter)}
    if isinstance(command, click.Group):
        for below, child in command.commands.items():
            yield from parameters(f"{name} {below}", child)


def option_names(parameter: click.Parameter) -> list[str]:
    if isinstance(parameter, click.Option):
        return parameter.opts + parameter.secondary_opts
    return [str(parameter.name).upper()]


def test_public_names_are_frozen_and_exist() -> None:
    assert set(llamahome.__all__) == PUBLIC_NAMES
    assert set(dir(llamahome)) == PUBLIC_NAMES
    assert all(getattr(llamahome, name) is not None for name in PUBLIC_NAMES)


def test_commands_and_options_are_frozen() -> None:
    assert dict(parameters("llamahome", cli)) == COMMANDS


def test_every_command_and_option_says_what_it_does() -> None:
    def check(command: click.Command) -> None:
        assert command.help, command.name
        assert all(option.help for option in command.params if isinstance(option, click.Option)), command.name
        for child in command.commands.values() if isinstance(command, click.Group) else ():
            check(child)

    check(cli)
