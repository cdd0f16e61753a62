"""The command line. Every expected fault ends in one line on stderr and a documented exit code."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from llamahome import __version__
from llamahome.errors import ConfigError, LlamaHomeError

if TYPE_CHECKING:
    from llamahome.config import Config

F = TypeVar("F", bound=Callable[..., Any])
EXIT_CODES = """\b
Exit codes: 0 done, 1 unexpected, 2 usage or configuration, 3 data, 4 model or
checkpoint, 5 memory, 6 storage or lock, 7 non-finite numbers, 8 distributed,
9 missing dependency or hardware, 130 / 143 stopped by a signal after saving."""


def _settings(command: F) -> F:
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


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llamahome")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Fine-tune large language models within the memory you allow, exactly, on the machine you have."""
    # Read by huggingface_hub when it is imported: no tracking, no advertising.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    _show_log(logging.DEBUG if debug else logging.INFO)


@cli.command()
@click.argument("data", required=False)
@click.option("--model", help="Base model: folder, GGUF file or hub id [default: the embedded SmolLM2-135M].")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run [default: output/training].")
@click.option("--eval-data", help="Data to evaluate on; without it a part of DATA is held out.")
@_settings
def train(data: str | None, model: str | None, output: Path | None, eval_data: str | None, **given: Any) -> None:
    """Fine-tune a model on DATA (file, folder, glob or hub id); without DATA on built-in examples."""
    from llamahome.training.signals import StopSignal

    with StopSignal() as signals:
        paths = {"data.path": data, "data.eval_path": eval_data, "model.name": model, "training.output": output}
        values: dict[str, object] = {key: str(value) for key, value in paths.items() if value is not None}
        config = _config(given, values)
        hooks = {}
        if config.data.path is None:
            from llamahome.training.demo import demo_config, talk

            config = demo_config(config, given["overrides"], own_settings=given["config_file"] is not None)
            hooks = {"before": talk("before", _print), "after": talk("after", _print)}
        if config.training.retries:
            words = [*sys.argv[1:], "--output", str(config.training.output)]
            _supervise(words, given, config, Path(config.training.output))
        from llamahome.training.run import train as run_training

        _finish(run_training(config, view=_view(config), signals=signals, **hooks))


@cli.command("train-resume")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_settings
def train_resume(checkpoint: Path, **given: Any) -> None:
    """Go on from CHECKPOINT: a checkpoint-N folder, or a run folder (its newest good one)."""
    from llamahome.training.signals import StopSignal

    with StopSignal() as signals:
        from llamahome.training.checkpoint import run_of
        from llamahome.training.run import resume, resumed_config

        changes = _overrides(given), given["config_file"]
        config = resumed_config(checkpoint, *changes)
        if config.training.retries:
            _supervise(sys.argv[1:], given, config, run_of(checkpoint))
        _finish(resume(checkpoint, *changes, view=_view, signals=signals))


@cli.command("train-eval")
@click.argument("model")
@click.argument("data")
@click.option("--output", type=click.Path(path_type=Path), help="File for the figures, as JSON.")
@click.option("--model", "base", help="Base model of an adapter [default: the one it names].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_settings
def train_eval(model: str, data: str, output: Path | None, base: str | None, as_json: bool, **given: Any) -> None:
    """Loss, perplexity and token accuracy of MODEL (model, adapter, run or checkpoint folder) on DATA."""
    from dataclasses import asdict

    from llamahome.files import write_json
    from llamahome.training.checkpoint import model_folder
    from llamahome.training.evaluate import evaluate

    config, folder = _config(given, _base(base)), Path(model).expanduser()
    result = evaluate(model_folder(folder) if folder.is_dir() else model, data, config)
    figures = {"model": model, "data": data, **asdict(result)}
    if as_json:
        _print(json.dumps(figures))
    else:
        _print(
            f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.3f}, "
            f"token accuracy {figures['token_accuracy']:.2%} "
            f"({figures['trained_tokens']:,} trained tokens in {figures['samples']:,} samples)"
        )
    if output or folder.is_dir():
        write_json(output or folder / "evaluation.json", figures)


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for the merged model.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32", "fp16"]), help="Number format [default: the base model's].")
@click.option("--model", "base", help="The adapter's base model [default: the one it names].")
@_settings
def merge(adapter: Path, output: Path, dtype: str | None, base: str | None, **given: Any) -> None:
    """Merge ADAPTER (its folder, or a run's) into its base model, proved equal to the adapter on probe prompts."""
    from llamahome.model.export import merge_adapter
    from llamahome.training.checkpoint import model_folder

    config, adapter = _config(given, _base(base)), model_folder(adapter.expanduser())
    _print(str(merge_adapter(adapter, output, config.model, dtype=dtype, cache_dir=config.cache.dir)))


@cli.group()
def data() -> None:
    """Check, prepare and verify data before training."""


@data.command("check")
@click.argument("path")
@click.option("--model", help="Model whose tokenizer and chat template are used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_settings
def data_check(path: str, model: str | None, as_json: bool, **given: Any) -> None:
    """Every fault of PATH as file:line:field, counts, lengths, and what would be trained."""
    from llamahome.data.prepare import check
    from llamahome.model.load import load_tokenizer, resolve_model

    config = _config(given, _base(model))
    report = check(path, load_tokenizer(resolve_model(None, config.model, config.cache.dir)), config=config)
    _print(json.dumps(report.to_dict()) if as_json else report.to_text())
    if report.faults:
        raise click.exceptions.Exit(3)


@data.command("prepare")
@click.argument("path", metavar="DATA")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to fill.")
@click.option("--eval-data", help="Data to evaluate on; without it a part of DATA is held out.")
@click.option("--shard", metavar="I/N", help="Do the I-th of N parts, for many machines; train on all of them.")
@click.option("--model", help="Model whose tokenizer and chat template are used.")
@_settings
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
    config = _config(given, _base(model))
    tokenizer = load_tokenizer(resolve_model(None, config.model, config.cache.dir))
    with progress_view() as show:
        report = prepare_folder(path, tokenizer, output, config=config, eval_data=eval_data, part=part, show=show)
    _print(report.to_text())


@data.command("verify")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option("--cache", "whole_cache", is_flag=True, help="Every entry of the cache of tokenised data.")
@_settings
def data_verify(folders: tuple[Path, ...], whole_cache: bool, **given: Any) -> None:
    """Read every byte of prepared FOLDERS; damage is named by file and byte, and ends with exit code 3."""
    from llamahome.data.prepared import verify_all
    from llamahome.memory.monitor import format_bytes

    config = _config(given)
    if not folders and not whole_cache:
        raise click.UsageError("nothing to verify: name folders, or --cache")
    faults = 0
    for folder, found in verify_all(folders, config if whole_cache else None):
        if isinstance(found, tuple):
            _print(f"{folder}: {found[0]:,} documents in {format_bytes(found[1])}, all good")
        else:
            _say(f"error: {found}")
            faults += 1
    if faults:
        raise click.exceptions.Exit(3)


@cli.group()
def cache() -> None:
    """The cache of tokenised data."""


@cache.command("ls")
@_settings
def cache_ls(**given: Any) -> None:
    """List the entries: key, size, and when each was last used."""
    from llamahome.data.cache import Cache
    from llamahome.memory.monitor import format_bytes

    for entry in Cache.from_config(_config(given)).entries():
        age = _age(time.time() - entry.last_used) + " ago" + (", in use" if entry.in_use else "")
        _print(f"{entry.key}  {format_bytes(entry.bytes):>8}  {age}")


@cache.command("clear")
@_settings
def cache_clear(**given: Any) -> None:
    """Delete every entry that no run uses."""
    from llamahome.data.cache import Cache

    count = len(Cache.from_config(_config(given)).clear())
    _print(f"{count} {'entry' if count == 1 else 'entries'} deleted")


def main() -> None:
    """Run the command line and end the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a text that the locale cannot show ends no run
    code = _run()
    try:
        if sys.stdout is not None:  # closed before we began
            sys.stdout.flush()
    except (OSError, ValueError):
        # The reader of stdout went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _run() -> int:
    """Exit code of the command; what went wrong is on stderr."""
    try:
        return int(cli.main(prog_name="llamahome", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        _say(error.format_message())
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        more = f"; see {context.command_path} --help" if context else ""
        return _fail(error.format_message().rstrip(".") + more, error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped", 130)
    except ConfigError as error:
        _explain()
        for fault in error.faults:
            _fail(fault, error.exit_code)
        return error.exit_code
    except LlamaHomeError as error:
        _explain()
        return _fail(str(error), error.exit_code)
    except Exception as error:
        from llamahome.memory.oom import is_oom

        if not is_oom(error):
            raise
        _explain()
        return _fail(f"out of memory: {str(error).strip() or type(error).__name__}; close other programs", 5)


def _config(given: dict[str, Any], values: dict[str, object] | None = None) -> Config:
    """The configuration: defaults, then the file, then the command line."""
    from llamahome.config import Config

    arguments = [f"{key}={json.dumps(value)}" for key, value in (values or {}).items()]
    return Config.load(given["config_file"], [*_overrides(given), *arguments])


def _base(model: str | None) -> dict[str, object]:
    return {"model.name": model} if model is not None else {}


def _overrides(given: dict[str, Any]) -> list[str]:
    flags = [f"model.{name}=true" for name in ("trust_remote_code", "allow_pickle") if given[name]]
    return [*given["overrides"], *flags]


def _view(config: Config) -> Any:
    from llamahome.monitor.progress import build_progress

    return build_progress(interval=config.monitor.interval)


def _finish(result: Any) -> None:
    for line in result.summary():
        _print(line)


def _supervise(words: list[str], given: dict[str, Any], config: Config, run: Path) -> None:
    """Run the command `words` in a process of its own and go on with the run when it is killed."""
    from llamahome.training.recovery import supervise

    once = ["--set", "training.retries=0"]
    resume = ["train-resume", str(run), *(word for change in _overrides(given) for word in ("--set", change))]
    code = supervise([*words, *once], [*resume, *once], run, config.training.retries)
    raise click.exceptions.Exit(code)


class _Lines(logging.Handler):
    """Log records as plain lines on the stderr of the moment (a live view may have replaced it)."""

    def emit(self, record: logging.LogRecord) -> None:
        label = {logging.INFO: "", logging.DEBUG: "debug: "}.get(record.levelno, f"{record.levelname.lower()}: ")
        _say(label + record.getMessage())


def _show_log(level: int) -> None:
    log = logging.getLogger("llamahome")
    log.handlers[:] = [_Lines()]
    log.setLevel(level)
    log.propagate = False


def _explain() -> None:
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exc()


def _fail(message: str, code: int) -> int:
    _say("error: " + " ".join(message.split()))
    return code


def _say(line: str) -> None:
    _print(line, sys.stderr)


def _print(line: str, stream: TextIO | None = None) -> None:
    """A line for whoever still reads; nobody's absence stops a run."""
    try:
        print(line, file=stream or sys.stdout, flush=True)
    except (OSError, ValueError):
        return


def _age(seconds: float) -> str:
    """The time in its largest unit."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"
