"""The command line. Every expected fault ends in one line on stderr and a documented exit code."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
    from llamahome.train.signals import StopSignal

    with StopSignal() as signals:
        paths = {"data.path": data, "data.eval_path": eval_data, "model.name": model, "training.output": output}
        values: dict[str, object] = {key: str(value) for key, value in paths.items() if value is not None}
        config = _config(given, values)
        if config.training.retries:
            _supervise(config)
        from llamahome.train.demo import demo_config, talk
        from llamahome.train.run import train as run_training

        hooks = {}
        if config.data.path is None:
            config = demo_config(config, given["overrides"])
            hooks = {"before": talk("before", click.echo), "after": talk("after", click.echo)}
        _finish(run_training(config, view=_view(config), signals=signals, **hooks))


@cli.command("train-resume")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_settings
def train_resume(checkpoint: Path, **given: Any) -> None:
    """Go on from CHECKPOINT: a checkpoint-N folder, or a run folder (its newest good one)."""
    from llamahome.train.signals import StopSignal

    with StopSignal() as signals:
        from llamahome.train.run import resume

        _finish(resume(checkpoint, _overrides(given), given["config_file"], view=_view, signals=signals))


@cli.command("train-eval")
@click.argument("model")
@click.argument("data")
@click.option("--output", type=click.Path(path_type=Path), help="File for the figures, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_settings
def train_eval(model: str, data: str, output: Path | None, as_json: bool, **given: Any) -> None:
    """Loss, perplexity and token accuracy of MODEL (model, adapter, run or checkpoint folder) on DATA."""
    from dataclasses import asdict

    from llamahome.files import write_json
    from llamahome.train.evaluate import evaluate

    figures = {"model": model, "data": data, **asdict(evaluate(model, data, _config(given)))}
    target = output or Path(model) / "evaluation.json"
    if output or Path(model).is_dir():
        write_json(target, figures)
    if as_json:
        click.echo(json.dumps(figures))
    else:
        click.echo(
            f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.3f}, "
            f"token accuracy {figures['token_accuracy']:.2%} "
            f"({figures['trained_tokens']:,} trained tokens in {figures['samples']:,} samples)"
        )


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for the merged model.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32", "fp16"]), help="Number format [default: the base model's].")
@_settings
def merge(adapter: Path, output: Path, dtype: str | None, **given: Any) -> None:
    """Merge ADAPTER into its base model, proved equal to the adapter on probe prompts."""
    from llamahome.model.export import merge_adapter

    config = _config(given)
    click.echo(merge_adapter(adapter, output, config.model, dtype=dtype, cache_dir=config.cache.dir))


@cli.group()
def data() -> None:
    """Check data before training."""


@data.command("check")
@click.argument("path")
@click.option("--model", help="Model whose tokenizer and chat template are used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_settings
def data_check(path: str, model: str | None, as_json: bool, **given: Any) -> None:
    """Every fault of PATH as file:line:field, counts, lengths, and what would be trained."""
    from llamahome.data.prepare import check
    from llamahome.model.load import load_tokenizer, resolve_model

    config = _config(given, {"model.name": model} if model else {})
    report = check(path, load_tokenizer(resolve_model(None, config.model, config.cache.dir)), config=config)
    click.echo(json.dumps(report.to_dict()) if as_json else report.to_text())
    if report.faults:
        sys.exit(3)


@cli.group()
def cache() -> None:
    """The cache of tokenised data."""


@cache.command("ls")
@_settings
def cache_ls(**given: Any) -> None:
    """List the entries."""
    from llamahome.data.cache import Cache

    for entry in Cache.from_config(_config(given)).entries():
        click.echo(entry)


@cache.command("clear")
@_settings
def cache_clear(**given: Any) -> None:
    """Delete every entry that no run uses."""
    from llamahome.data.cache import Cache

    click.echo(f"{len(Cache.from_config(_config(given)).clear())} entries deleted")


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped", 130)
    except ConfigError as error:
        _explain()
        for fault in error.faults:
            _say(f"error: {fault}")
        sys.exit(error.exit_code)
    except LlamaHomeError as error:
        _explain()
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of stdout went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _config(given: dict[str, Any], values: dict[str, object] | None = None) -> Config:
    """The configuration: defaults, then the file, then the command line."""
    from llamahome.config import Config

    return Config.load(given["config_file"], [*_overrides(given), *(f"{k}={json.dumps(v)}" for k, v in (values or {}).items())])


def _overrides(given: dict[str, Any]) -> list[str]:
    flags = [f"model.{name}=true" for name in ("trust_remote_code", "allow_pickle") if given[name]]
    return [*given["overrides"], *flags]


def _view(config: Config) -> Any:
    from llamahome.monitor.progress import build_progress

    return build_progress(interval=config.monitor.interval)


def _finish(result: Any) -> None:
    for line in result.summary():
        click.echo(line)


def _supervise(config: Config) -> None:
    """Run this command in a process of its own and start it again when it is killed."""
    from llamahome.train.recovery import supervise

    run = Path(config.training.output)
    once = ["--set", "training.retries=0"]
    sys.exit(supervise([*sys.argv[1:], *once], ["train-resume", str(run), *once], run, config.training.retries))


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


def _fail(message: str, code: int) -> None:
    _say("error: " + " ".join(message.split()))
    sys.exit(code)


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (BrokenPipeError, ValueError):
        return
