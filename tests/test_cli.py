"""The commands as a user types them: what they print, leave behind and return, whatever the terminal is like."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from llamahome import __version__
from llamahome.cli import cli, main
from llamahome.model.export import TOLERANCES
from llamahome.training.checkpoint import checkpoints

Answer = tuple[int, str, list[str]]
COMMANDS = [f"{name} {sub}".strip() for name, found in cli.commands.items() for sub in getattr(found, "commands", [""])]
ROWS = [{"prompt": f"Say {n} in words.", "completion": "one two three four"[: 3 + n % 15]} for n in range(40)]
SETTINGS = {
    "processing.compile_mode": "none", "processing.precision": "fp32", "processing.threads": 1, "monitor.sinks": "[]",
    "optimization.max_steps": 6, "optimization.global_batch_size": 4, "optimization.learning_rate": 0.01,
    "optimization.warmup_steps": 0, "training.save_steps": 2, "lora.rank": 4,
}  # fmt: skip


def sets(**changes: object) -> list[str]:
    given = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def real(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "llamahome", *words], env=os.environ | environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Any]:
    """Run the command in this process: exit code, stdout, and the lines of stderr."""
    log = logging.getLogger("llamahome")
    before = log.handlers[:], log.level, log.propagate
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["llamahome", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err.splitlines()

    yield call
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run made by the real command, and what the command said."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_rows(folder / "rows.jsonl")
    words = ["train", str(data), "--model", str(tiny_model_dir), "--output", str(folder / "run"), *sets()]
    return folder / "run", real(words, LLAMAHOME_CACHE=str(folder / "cache"), HF_HUB_OFFLINE="1")


@pytest.fixture
def run(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "event" not in line]


class TestTrain:
    def test_it_says_what_it_did(self, trained: tuple[Path, Any]) -> None:
        run, answer = trained
        assert answer.returncode == 0, answer.stderr
        *lines, losses, model, chat = answer.stdout.splitlines()
        assert re.fullmatch(r"held-out loss \d\.\d{4} before, \d\.\d{4} after 6 steps", losses)
        assert model == f"model in {run / 'final'}"
        assert chat == f"talk to it: llamahome chat {run}"
        assert any(line.startswith("step 6/6, loss ") for line in lines)
        assert "6 steps of 4 samples (optimization.max_steps, optimization.global_batch_size)" in answer.stderr
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", answer.stdout)
        assert steps(run) == [1, 2, 3, 4, 5, 6]

    def test_it_goes_on_to_more_steps(self, run: Path, command: Any) -> None:
        code, out, _ = command("train-resume", run, "--set", "optimization.max_steps=8")
        assert code == 0
        assert out.splitlines()[-2] == "model in run/final"
        assert steps(run) == list(range(1, 9))

    def test_an_older_checkpoint_takes_the_run_back(self, run: Path, command: Any) -> None:
        before = (run / "final" / "adapter_model.safetensors").read_bytes()
        code, _, lines = command("train-resume", run / "checkpoint-2")
        assert code == 0
        assert any(line.startswith("warning: checkpoint-6 is set aside as checkpoint-6.superseded") for line in lines)
        assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        assert (run / "final" / "adapter_model.safetensors").read_bytes() == before


class TestEval:
    def test_figures_as_text_and_in_a_file(self, run: Path, command: Any) -> None:
        data = write_rows(run.parent / "rows.jsonl")
        code, out, _ = command("train-eval", run, data, *sets())
        figures = json.loads((run / "evaluation.json").read_text())
        assert code == 0
        assert out == (
            f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.3f}, "
            f"token accuracy {figures['token_accuracy']:.2%} "
            f"({figures['trained_tokens']} trained tokens in 40 samples)\n"
        )
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        assert figures["data"] == str(data)

    def test_figures_as_json(self, run: Path, command: Any, tiny_model_dir: Path) -> None:
        data = write_rows(run.parent / "rows.jsonl")
        losses = []
        for model in (run, run / "final", run / "checkpoint-6", tiny_model_dir):
            words = [model, data, "--json", "--output", run.parent / "figures.json", *sets()]
            code, out, _ = command("train-eval", *words)
            assert code == 0
            assert json.loads(out) == json.loads((run.parent / "figures.json").read_text())
            losses.append(json.loads(out)["loss"])
        assert losses[0] == losses[1] == losses[2] < losses[3]
        assert not (tiny_model_dir / "evaluation.json").exists()

    def test_figures_are_not_lost_with_their_file(self, run: Path, command: Any) -> None:
        data = write_rows(run.parent / "rows.jsonl")
        code, out, lines = command("train-eval", run, data, "--output", data / "x.json", *sets())
        assert code == 6
        assert out.startswith("loss ")
        assert lines[-1].startswith("error: cannot write: Not a directory; ")


class TestData:
    def test_good_data(self, command: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
        data = write_rows(tmp_path / "rows.jsonl")
        code, out, _ = command("data", "check", data, "--model", tiny_model_dir)
        assert code == 0
        assert "rows: 40" in out
        assert "⟦" in out
        code, out, _ = command("data", "check", data, "--model", tiny_model_dir, "--json")
        report = json.loads(out)
        assert (code, report["rows"], report["faults"]) == (0, 40, [])

    def test_faults_are_all_listed(self, command: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text(
            '{"prompt": "a", "completion": "b"}\n[1]\n{"prompt": 5, "completion": "b"}\n{\n'
        )
        code, out, _ = command("data", "check", "rows.jsonl", "--model", tiny_model_dir)
        assert code == 3
        for place in ("rows.jsonl:2;", "rows.jsonl:3:prompt;", "rows.jsonl:4;"):
            assert place in out
        code, out, _ = command("data", "check", "rows.jsonl", "--model", tiny_model_dir, "--json")
        assert code == 3
        assert len(json.loads(out)["faults"]) >= 3


def test_merge(run: Path, command: Any, tmp_path: Path) -> None:
    code, out, _ = command("merge", run, "--output", tmp_path / "merged")
    assert code == 0
    assert out.startswith("merged in float32: logits on ")
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert command("merge", run, "--output", tmp_path / "merged")[0] == 2


def test_merge_writes_a_card_of_the_run(run: Path, command: Any, tmp_path: Path) -> None:
    code, out, _ = command("merge", run, "--output", tmp_path / "merged", "--format", "gguf-q8_0")
    assert code == 0
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {"model-q8_0.gguf", "merge.json", "README.md"}
    card, facts = (tmp_path / "merged" / "README.md").read_text(), json.loads((run / "run.json").read_bytes())
    assert out.strip() in card
    assert f"| data_fingerprint | `{facts['data_fingerprint']}` |" in card
    assert "| lora.rank | `4` |" in card
    assert re.search(r"^\| loss \| \d\.\d+ \|$", card, re.MULTILINE)
    assert str(run) not in card


def test_merge_without_proof_leaves_nothing(run: Path, command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(TOLERANCES, "f16", 1e-9)
    words = ["merge", run, "--output", tmp_path / "merged", "--format", "gguf-f16"]
    assert command(*words, "--dtype", "bf16")[0] == 2
    code, out, lines = command(*words)
    assert (code, out, (tmp_path / "merged").exists()) == (4, "", False)
    assert re.fullmatch(r"error: the merged model's logits differ by \S+, more than 1e-09; .*", lines[-1])


def test_cache(command: Any, tiny_model_dir: Path, tmp_path: Path, isolated_home: Path) -> None:
    assert command("cache", "ls") == (0, "", [])
    assert command("cache", "clear")[1] == "0 entries deleted\n"
    data = write_rows(tmp_path / "rows.jsonl")
    assert command("train", data, "--model", tiny_model_dir, *sets(optimization__max_steps=1))[0] == 0
    code, out, lines = command("cache", "ls")
    assert (code, lines) == (0, [])
    assert re.fullmatch(r"[0-9a-f]{32} +\d+(\.\d+)? k?B  less than a minute ago\n", out)
    lock = next((isolated_home / "cache" / "tokens").glob("*.lock"))
    for age, text in ((90, "1 minute"), (7300, "2 hours"), (5 * 86400, "5 days")):
        os.utime(lock, (time.time() - age, time.time() - age))
        assert command("cache", "ls")[1].endswith(f"  {text} ago\n")
    assert command("cache", "clear") == (0, "1 entry deleted\n", [])
    assert command("cache", "ls") == (0, "", [])


class TestHelp:
    def test_version(self, command: Any) -> None:
        assert command("--version") == (0, f"llamahome, version {__version__}\n", [])

    @pytest.mark.parametrize("words", COMMANDS)
    def test_every_option_is_explained(self, command: Any, words: str) -> None:
        code, out, lines = command(*words.split(), "--help")
        assert (code, lines) == (0, [])
        assert out == command(*words.split(), "-h")[1]
        found: Any = cli
        for word in words.split():
            found = found.commands[word]
        options = [option for option in found.params if isinstance(option, click.Option)]
        assert all(option.help and option.opts[0] in out for option in options)

    def test_every_command_is_listed(self, command: Any) -> None:
        documented = {"train", "train-resume", "train-eval", "data check", "merge", "cache ls", "cache clear"}
        assert documented <= set(COMMANDS)
        out = command("--help")[1]
        assert all(name in out for name in cli.commands)
        assert "Exit codes: 0 done, " in out

    def test_without_a_command(self, command: Any) -> None:
        code, out, lines = command()
        assert (code, out, lines[0]) == (2, "", "Usage: llamahome [OPTIONS] COMMAND [ARGS]...")

    def test_help_loads_nothing_heavy(self) -> None:
        code = (
            "import sys; sys.argv = ['llamahome', 'train', '--help']\n"
            "from llamahome.cli import main\n"
            "try: main()\n"
            "finally: assert not {'torch', 'transformers', 'numpy', 'peft', 'pyarrow', 'pydantic'} & set(sys.modules)"
        )
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, answer.stderr


class TestTerminals:
    def test_nobody_reads_and_nothing_is_as_usual(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        """Stdout closed after a line, no HOME, a dumb terminal, the C locale, spaces and umlauts in every path."""
        folder = tmp_path / "ein Ordner, ü 空"
        folder.mkdir()
        model = shutil.copytree(tiny_model_dir, folder / "das Modell")
        data = write_rows(folder / "Sätze.jsonl")
        environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "LANG", "NO_COLOR")}
        environment |= {"TERM": "dumb", "LC_ALL": "C", "LLAMAHOME_CACHE": str(folder / "Zwischenspeicher")}
        words = ["train", data.name, "--model", str(model), "--output", "Läufe/erster", *sets(monitor__interval=1)]
        process = subprocess.Popen(
            [sys.executable, "-m", "llamahome", *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait() == 0, stderr
        assert "Traceback" not in stderr
        assert "Broken" not in stderr
        assert steps(folder / "Läufe" / "erster") == [1, 2, 3, 4, 5, 6]
        status = json.loads((folder / "Läufe" / "erster" / "status.json").read_text())
        assert (status["state"], status["code"]) == ("done", 0)

    @pytest.mark.parametrize("stream", ["closed", "full"])
    def test_an_error_keeps_its_code_where_nothing_can_be_written(self, stream: str) -> None:
        redirect = {"closed": ">&- 2>&-", "full": ">/dev/full 2>/dev/full"}[stream]
        for words in (["trian"], []):
            shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "llamahome", *words]
            assert subprocess.run(shell, timeout=60).returncode == 2

    def test_remote_code_is_refused_without_a_question(
        self, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        model = shutil.copytree(tiny_model_dir, tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}))
        (model / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
        answer = real(["train", str(write_rows(tmp_path / "rows.jsonl")), "--model", str(model), *sets()])
        assert answer.returncode == 4
        assert answer.stdout == ""
        assert answer.stderr.startswith("error: the model asks to run its own Python code (own.Model); ")
        assert not (tmp_path / "canary").exists()


KILLER = '''
import os, signal
from pathlib import Path

def kill_once(event, loop, record):
    """The process dies in the step that is named, but only the first time."""
    if event == "step" and loop.state.step == int(os.environ.get("KILL_STEP", 0)) and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "step" and loop.state.step == 3 and "WAIT" in os.environ:
        Path("waiting").touch()
        while not Path("go").exists():
            signal.sigtimedwait([], 0.01)
'''


class TestRetries:
    @pytest.fixture
    def words(self, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "killer.py").write_text(KILLER)
        data = write_rows(tmp_path / "rows.jsonl")
        more = {"training__callbacks": "[killer:kill_once]", "training__retries": 2}
        return lambda **given: [
            "train",
            str(data),
            "--model",
            str(tiny_model_dir),
            "--output",
            "run",
            *sets(**more, **given),
        ]

    def test_a_killed_run_is_taken_up_again(
        self, words: Callable[..., list[str]], trained: tuple[Path, Any], tmp_path: Path
    ) -> None:
        answer = real(words(), KILL_STEP="5")
        assert answer.returncode == 0, answer.stderr
        assert "warning: the run ended with code 137; train-resume again, 1 more tries" in answer.stderr
        name = "final/adapter_model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (trained[0] / name).read_bytes()
        assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]

    @pytest.mark.slow
    def test_so_is_one_without_a_checkpoint(
        self, words: Callable[..., list[str]], trained: tuple[Path, Any], tmp_path: Path
    ) -> None:
        answer = real(words(training__eval_steps=1, training__save_steps=100), KILL_STEP="2")
        assert answer.returncode == 0, answer.stderr
        assert "warning: the run ended with code 137; train again, 1 more tries" in answer.stderr
        name = "final/adapter_model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (trained[0] / name).read_bytes()

    @pytest.mark.slow
    def test_a_signal_reaches_the_run_and_ends_the_retries(
        self, words: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "llamahome", *words()], env=os.environ | {"KILL_STEP": "0", "WAIT": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not (tmp_path / "waiting").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        (tmp_path / "go").touch()
        assert process.wait(timeout=60) == 143
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert (status["state"], status["code"], status["last_step"]) == ("stopped", 143, 3)

    def test_what_would_fail_again_is_not_tried_again(self, words: Callable[..., list[str]]) -> None:
        answer = real([*words(), "--model", "./none"])
        assert answer.returncode == 4
        assert answer.stderr.count("error: no such model folder or file") == 1
        assert "tries" not in answer.stderr


def test_a_lack_of_memory_anywhere_is_one_line_and_code_5(monkeypatch, capsys, tiny_model_dir, tmp_path):
    from llamahome import cli
    from llamahome.training import evaluate

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(evaluate, "evaluate", fail)
    monkeypatch.setattr("sys.argv", ["llamahome", "train-eval", str(tiny_model_dir), str(tmp_path)])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 5
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: out of memory: DefaultCPUAllocator")
