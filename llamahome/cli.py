"""The command line. Every expected fault ends in one line on stderr and a documented exit code."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamahome import __version__
from llamahome.commands.data import cache, data
from llamahome.commands.import_config import import_config
from llamahome.commands.init import completion, init
from llamahome.commands.launch import launch, tell_torchrun, without_option
from llamahome.commands.merge import merge
from llamahome.commands.options import base_model, changes, load_config, print_error, print_line, settings
from llamahome.commands.plan import plan
from llamahome.commands.tools import chat, doctor, report, watch
from llamahome.distributed.ranks import from_environment, launched
from llamahome.errors import ConfigError, LlamaHomeError

if TYPE_CHECKING:
    from llamahome.config import Config

EXIT_CODES = """\b
Exit codes: 0 done, 1 unexpected, 2 usage or configuration, 3 data, 4 model or
checkpoint, 5 memory, 6 storage or lock, 7 non-finite numbers, 8 distributed,
9 missing dependency or hardware, 130 / 143 stopped by a signal after saving."""


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llamahome")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Fine-tune large language models within the memory you allow, exactly, on the machine you have."""
    # Read by huggingface_hub when it is imported: no tracking, no advertising.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Read by torch at its first tensor: it asks the kernel for huge pages for those from 2 MiB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _show_log(logging.DEBUG if debug else logging.INFO)


@cli.command(short_help="Fine-tune a model on your data.")
@click.argument("data", required=False)
@click.option("--model", help="Base model: folder, GGUF file or hub id [default: the embedded SmolLM2-135M].")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run [default: output/training].")
@click.option("--eval-data", help="Data to evaluate on; without it a part of DATA is held out.")
@click.option("--dry-run", is_flag=True, help="Only the checks before the first step; nothing is trained or left.")
@click.option("--nproc", type=click.IntRange(1), help="Processes on this host that share the run (torchrun).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per step and event, and nothing else.")
@settings
def train(
    data: str | None, model: str | None, output: Path | None, eval_data: str | None, dry_run: bool, nproc: int | None,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Fine-tune a model on DATA (file, folder, glob or hub id); without DATA on built-in examples."""
    from llamahome.training.signals import StopSignal

    with StopSignal() as signals:
        paths = {"data.path": data, "data.eval_path": eval_data, "model.name": model, "training.output": output}
        values: dict[str, object] = {key: str(value) for key, value in paths.items() if value is not None}
        config = load_config(given, values)
        hooks: dict[str, Any] = {}
        if config.data.path is None:
            if nproc:
                raise click.UsageError("--nproc needs DATA: the built-in examples are trained by one process")
            from llamahome.training.demo import demo_config, talk

            config = demo_config(config, given["overrides"], own_settings=given["config_file"] is not None)
            say = print_error if as_json else print_line
            hooks = {"before": talk("before", say), "after": talk("after", say)}
        if dry_run:
            _try_only(config, as_json)
            return
        words = [*sys.argv[1:], "--output", str(config.training.output)]
        _supervise(words, given, config, Path(config.training.output), nproc)
        from llamahome.training.run import train as run_training

        _finish(run_training(config, view=_view(config, as_json), signals=signals, **hooks), as_json)


@cli.command("train-resume", short_help="Go on from a checkpoint, or with a stopped run.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--trust-run", is_flag=True, help="Run the code that the run's own record names.")
@click.option("--nproc", type=click.IntRange(1), help="Processes on this host that share the run (torchrun).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per step and event, and nothing else.")
@settings
def train_resume(checkpoint: Path, trust_run: bool, nproc: int | None, as_json: bool, **given: Any) -> None:
    """Go on from CHECKPOINT: a checkpoint-N folder, or a run folder (its newest good one)."""
    from llamahome.training.signals import StopSignal

    with StopSignal() as signals:
        from llamahome.training.checkpoint import run_of
        from llamahome.training.run import resume, resumed_config

        asked = changes(given), given["config_file"]
        config = resumed_config(checkpoint, *asked, trust_run=trust_run)
        _supervise(sys.argv[1:], given, config, run_of(checkpoint), nproc)
        result = resume(
            checkpoint, *asked, view=lambda config: _view(config, as_json), signals=signals, trust_run=trust_run
        )
        _finish(result, as_json)


@cli.command("train-eval", short_help="Loss, perplexity and token accuracy of a model on data.")
@click.argument("model")
@click.argument("data")
@click.option("--output", type=click.Path(path_type=Path), help="File for the figures, as JSON.")
@click.option("--model", "base", help="Base model of an adapter [default: the one it names].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@settings
def train_eval(model: str, data: str, output: Path | None, base: str | None, as_json: bool, **given: Any) -> None:
    """Loss, perplexity and token accuracy of MODEL (model, adapter, run or checkpoint folder) on DATA."""
    from dataclasses import asdict

    from llamahome.files import write_json
    from llamahome.training.checkpoint import model_folder
    from llamahome.training.evaluate import evaluate

    config, folder = load_config(given, base_model(base)), Path(model).expanduser()
    result = evaluate(model_folder(folder) if folder.is_dir() else model, data, config)
    figures = {"model": model, "data": data, **asdict(result)}
    if as_json:
        print_line(json.dumps(figures))
    else:
        print_line(
            f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.3f}, "
            f"token accuracy {figures['token_accuracy']:.2%} "
            f"({figures['trained_tokens']:,} trained tokens in {figures['samples']:,} samples)"
        )
    if output or folder.is_dir():
        write_json(output or folder / "evaluation.json", figures)


cli.add_command(data)
cli.add_command(cache)
cli.add_command(plan)
cli.add_command(merge)
cli.add_command(chat)
cli.add_command(doctor)
cli.add_command(report)
cli.add_command(watch)
cli.add_command(init)
cli.add_command(import_config)
cli.add_command(completion)


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
        print_error(error.format_message())
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        more = f"; see {context.command_path} --help" if context else ""
        return _fail(error.format_message().rstrip(".") + more, error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped", 130)
    except ConfigError as error:
        _explain(error)
        for fault in error.faults:
            _fail(fault, error.exit_code)
        return error.exit_code
    except LlamaHomeError as error:
        _explain(error)
        return _fail(str(error), error.exit_code)
    except Exception as error:
        from llamahome.memory.oom import is_oom

        if not is_oom(error):
            tell_torchrun(error)
            raise
        _explain(error)
        return _fail(f"out of memory: {str(error).strip() or type(error).__name__}; close other programs", 5)


def _view(config: Config, as_json: bool) -> Any:
    from llamahome.monitor.progress import JsonProgress, build_progress

    return JsonProgress(sys.stdout) if as_json else build_progress(interval=config.monitor.interval)


def _finish(result: Any, as_json: bool) -> None:
    if not from_environment().is_main:
        return
    if as_json:
        print_line(json.dumps(result.to_dict()))
        return
    for line in result.summary():
        print_line(line)


def _try_only(config: Config, as_json: bool) -> None:
    from llamahome.monitor.words import program
    from llamahome.training.preflight import dry_run

    found = dry_run(config)
    words = [word for word in sys.argv[1:] if word != "--dry-run"]
    print_line(json.dumps(found) if as_json else f"all of it works; train with: {shlex.join([program(), *words])}")


def _supervise(words: list[str], given: dict[str, Any], config: Config, run: Path, ranks: int | None) -> None:
    """Where asked for, run the command `words` in processes of their own, and go on with the run when one is killed."""
    from llamahome.training.recovery import supervise

    retries, once = config.training.retries, ["--set", "training.retries=0"]
    if launched():  # by torchrun, whose --max-restarts does this
        return
    if ranks is not None:
        alone = [*without_option(words, "--nproc"), *once]
        code = launch(alone, ranks, run, restarts=retries, timeout=config.distributed.timeout)
    elif retries:
        changed = (word for change in changes(given) for word in ("--set", change))
        code = supervise([*words, *once], ["train-resume", str(run), "--trust-run", *changed, *once], run, retries)
    else:
        return
    raise click.exceptions.Exit(code)


class _Lines(logging.Handler):
    """Log records as plain lines on the stderr of the moment (a live view may have replaced it)."""

    def emit(self, record: logging.LogRecord) -> None:
        label = {logging.INFO: "", logging.DEBUG: "debug: "}.get(record.levelno, f"{record.levelname.lower()}: ")
        print_error(label + record.getMessage())


def _show_log(level: int) -> None:
    log = logging.getLogger("llamahome")
    log.handlers[:] = [_Lines()]
    log.setLevel(level)
    log.propagate = False


def _explain(error: BaseException) -> None:
    tell_torchrun(error)
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exc()


def _fail(message: str, code: int) -> int:
    print_error("error: " + " ".join(message.split()))
    return code
