"""`llamahome merge`: a trained model as files that other programs load, proved equal to what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llamahome.commands.options import base_model, load_config, print_line, settings


@click.command(short_help="Merge an adapter into its base model, and export it.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for the merged model.")
@click.option(
    "--format", "form", type=click.Choice(["safetensors", "gguf-f16", "gguf-q8_0", "torchao"]), default="safetensors",
    show_default=True, help="Files to write; torchao is for what was trained by qat.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(["bf16", "fp32", "fp16"]), help="Number format [default: the base model's].")
@click.option("--model", "base", help="The adapter's base model [default: the one it names].")
@settings
def merge(adapter: Path, output: Path, form: Any, dtype: str | None, base: str | None, **given: Any) -> None:
    """Merge ADAPTER (its folder, or a run's) into its base model, proved equal to the adapter on probe prompts."""
    from llamahome.errors import UsageError
    from llamahome.model.export import merge_adapter
    from llamahome.training.checkpoint import model_folder

    if dtype and form != "safetensors":
        raise UsageError(f"the format {form} has its own numbers", where="--dtype", fix="leave it out")
    config, adapter = load_config(given, base_model(base)), model_folder(adapter.expanduser())
    report = merge_adapter(adapter, output, config.model, dtype=dtype, cache_dir=config.cache.dir, form=form)
    print_line(str(report))
