"""Commands for data before training, and for the cache of tokenised data."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import click

from llamahome.commands.options import base_model, load_config, print_error, print_line, settings


@click.group()
def data() -> None:
    """Check, prepare and verify data before training."""


@data.command("check")
@click.argument("path")
@click.option("--model", help="Model whose tokenizer and chat template are used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@settings
def data_check(path: str, model: str | None, as_json: bool, **given: Any) -> None:
    """Every fault of PATH as file:line:field, counts, lengths, and what would be trained."""
    from llamahome.data.prepare import check
    from llamahome.model.load import load_tokenizer, resolve_model

    config = load_config(given, base_model(model))
    report = check(path, load_tokenizer(resolve_model(None, config.model, config.cache.dir)), config=config)
    print_line(json.dumps(report.to_dict()) if as_json else report.to_text())
    if report.faults:
        raise click.exceptions.Exit(3)


@data.command("prepare")
@click.argument("path", metavar="DATA")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to fill.")
@click.option("--eval-data", help="Data to evaluate on; without it a part of DATA is held out.")
@click.option("--shard", metavar="I/N", help="Do the I-th of N parts, for many machines; train on all of them.")
@click.option("--model", help="Model whose tokenizer and chat template are used.")
@settings
def data_prepare(
    path: str, output: Path, eval_data: str | None, shard: str | None, model: str | None, **given: Any
) -> None:
    """Tokenise DATA into a folder that can be trained on. After a kill the same command goes on where it was."""
    from llamahome.data.prepare import prepare_folder
    from llamahome.data.progress import progress_view
    from llamahome.model.load import load_tokenizer, resolve_model

    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", shard or "1/1", re.ASCII)
    part = (int(found[1]), int(found[2])) if found else (1, 0)
    if part[0] > part[1]:
        raise click.BadParameter(f"{shard!r} is not I/N with I from 1 to N", param_hint="'--shard'")
    config = load_config(given, base_model(model))
    tokenizer = load_tokenizer(resolve_model(None, config.model, config.cache.dir))
    with progress_view() as show:
        report = prepare_folder(path, tokenizer, output, config=config, eval_data=eval_data, part=part, show=show)
    print_line(report.to_text())


@data.command("verify")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option("--cache", "whole_cache", is_flag=True, help="Every entry of the cache of tokenised data.")
@settings
def data_verify(folders: tuple[Path, ...], whole_cache: bool, **given: Any) -> None:
    """Read every byte of prepared FOLDERS; damage is named by file and byte, and ends with exit code 3."""
    from llamahome.data.prepared import verify_all
    from llamahome.memory.monitor import format_bytes

    config = load_config(given)
    if not folders and not whole_cache:
        raise click.UsageError("nothing to verify: name folders, or --cache")
    faults = 0
    for folder, found in verify_all(folders, config if whole_cache else None):
        if isinstance(found, tuple):
            print_line(f"{folder}: {found[0]:,} documents in {format_bytes(found[1])}, all good")
        else:
            print_error(f"error: {found}")
            faults += 1
    if faults:
        raise click.exceptions.Exit(3)


@click.group()
def cache() -> None:
    """The cache of tokenised data."""


@cache.command("ls")
@settings
def cache_ls(**given: Any) -> None:
    """List the entries: key, size, and when each was last used."""
    from llamahome.data.cache import Cache
    from llamahome.memory.monitor import format_bytes

    for entry in Cache.from_config(load_config(given)).entries():
        age = _age(time.time() - entry.last_used) + " ago" + (", in use" if entry.in_use else "")
        print_line(f"{entry.key}  {format_bytes(entry.bytes):>8}  {age}")


@cache.command("clear")
@settings
def cache_clear(**given: Any) -> None:
    """Delete every entry that no run uses."""
    from llamahome.data.cache import Cache

    count = len(Cache.from_config(load_config(given)).clear())
    print_line(f"{count} {'entry' if count == 1 else 'entries'} deleted")


def _age(seconds: float) -> str:
    """The time in its largest unit."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"
