"""Commands around a run: talk to what was trained, and look at the machine."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from llamahome.commands.options import base_model, load_config, print_line, settings


@click.command(short_help="Talk to a run, an adapter or a model.")
@click.argument("model", default="smollm2-135m")
@click.option("--prompt", help="Answer this and end [default: ask, line by line].")
@click.option("--system", help="What the model is told before everything else.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True,
    help="0 gives the most likely answer; more gives more varied ones.",
)  # fmt: skip
@click.option("--model", "base", help="Base model of an adapter [default: the one it names].")
@settings
def chat(model: str, prompt: str | None, base: str | None, **given: Any) -> None:
    """Talk to MODEL: a run, checkpoint, adapter or model folder, a GGUF file or a hub id."""
    from llamahome.chat import open_conversation, talk

    options = {name: given.pop(name) for name in ("system", "max_new_tokens", "temperature")}
    conversation = open_conversation(model, load_config(given, base_model(base)), **options)
    talk(conversation, [prompt] if prompt is not None else _questions(), _show)


def _questions() -> Iterator[str]:
    """Lines of stdin to its end; Ctrl-C between two answers is the end too."""
    asks = sys.stdin.isatty()
    if asks:
        print_line("Ctrl-D ends the talk, Ctrl-C an answer.")
    while True:
        try:
            yield input("> " if asks else "")
        except (EOFError, KeyboardInterrupt):
            return


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@click.command(short_help="One HTML page about one or more runs.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="The page [default: report.html in the first run].")
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """One page about RUNS (folders), finished or not: curves, memory, events, settings. Several are compared."""
    from llamahome.monitor.report import write_report

    print_line(str(write_report(runs, output)))


@click.command(short_help="Look on at a run from another terminal.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--interval", type=click.IntRange(1), default=10, show_default=True, help="Steps between two plain lines."
)
def watch(run: Path, interval: int) -> None:
    """Look on at the run in the folder RUN, from another terminal. Ctrl-C ends the watching, not the run."""
    from llamahome.monitor.progress import build_progress
    from llamahome.monitor.words import clean
    from llamahome.watch import watch as watch_run

    print_line(clean(watch_run(run, lambda clock: build_progress(interval, clock=clock))))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@settings
def doctor(as_json: bool, **given: Any) -> None:
    """What this machine has, what is missing, and what to type. Exit code 9 when runs cannot work."""
    from dataclasses import asdict

    from llamahome.doctor import examine, report_lines

    findings = examine(load_config(given))
    if as_json:
        print_line(json.dumps({finding.name: asdict(finding) for finding in findings}))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None
        for line in report_lines(findings, columns):
            print_line(line)
    if any(finding.state == "bad" for finding in findings):
        raise click.exceptions.Exit(9)
