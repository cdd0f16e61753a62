"""`llamahome init` writes what `llamahome train` reads; `llamahome completion` what a shell reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llamahome.cli import cli
from llamahome.commands.init import Choice, choose, short_file, whole_file
from llamahome.config import Config
from llamahome.errors import DataError, UsageError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("init") / "my data, new.csv"
    rows = "".join(f"Say {n} in words.,{'one two three four five six ' * (n % 12)}seven\n" for n in range(60))
    path.write_text("question,answer\n" + rows)
    return path


@pytest.fixture(scope="module")
def chosen(data: Path, tiny_model_dir: Path) -> list[Choice]:
    return list(choose(Config.load(None, {"data.path": str(data), "model.name": str(tiny_model_dir)})))


@pytest.mark.parametrize("write", [short_file, whole_file])
def test_what_was_written_is_read_back_with_every_choice(
    write: type, chosen: list[Choice], data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "llamahome.yaml"
    path.write_text(write(chosen, path))
    config = Config.load(path)
    read = config.to_dict()
    for choice in chosen:
        assert read[choice.section][choice.key] == choice.value
    assert config.training.output == Path("output/my-data-new")
    assert config.data.path == str(data)


def test_the_data_choose_the_length_and_the_passes(chosen: list[Choice]) -> None:
    found = {f"{choice.section}.{choice.key}": choice for choice in chosen}
    longest = int(re.findall(r"has ([\d,]+)", found["data.max_length"].why)[0])
    assert 128 <= longest <= int(str(found["data.max_length"].value)) < 2 * longest
    assert found["training.epochs"].value == 3  # 4 steps in one
    assert "question/answer" in found["data.path"].why


def test_a_short_file_says_why_above_each_setting(chosen: list[Choice]) -> None:
    lines = short_file(chosen, Path("llamahome.yaml")).splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"  (# )?\w+: ", line) and "# " not in line[:4]]
    assert len(keys) >= 10
    assert all(lines[number - 1].startswith("  # ") for number in keys)


def test_a_file_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "llamahome.yaml"
    path.write_text("mine")
    with pytest.raises(UsageError, match="there is a file already"):
        cli.main(["init", "--output", str(path)], standalone_mode=False)
    assert path.read_text() == "mine"


def test_data_without_a_sample_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    data, path = tmp_path / "bad.csv", tmp_path / "llamahome.yaml"
    data.write_text("name,age\nAda,36\n")
    with pytest.raises(DataError, match="nothing to train on"):
        cli.main(["init", str(data), "--model", str(tiny_model_dir), "--output", str(path)], standalone_mode=False)
    assert not path.exists()


def test_without_data_the_built_in_examples_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "run.yaml"
    cli.main(["init", "--output", str(path)], standalone_mode=False)
    assert capsys.readouterr().out == f"{path} written; train with: llamahome train --config {path}\n"
    assert Config.load(path).data.path is None


@pytest.mark.parametrize(("shell", "begins"), [("bash", "_llamahome_completion()"), ("zsh", "#compdef llamahome"),
                                               ("fish", "function _llamahome_completion")])  # fmt: skip
def test_a_shell_gets_its_script(shell: str, begins: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["completion", shell], standalone_mode=False)
    assert capsys.readouterr().out.lstrip().startswith(begins)


def test_the_script_completes_commands() -> None:
    asked = {"COMP_WORDS": "llamahome tr", "COMP_CWORD": "1", "_LLAMAHOME_COMPLETE": "bash_complete"}
    program = "import sys; sys.argv[0] = 'llamahome'; from llamahome.cli import main; main()"
    answer = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.split() == ["plain,train", "plain,train-eval", "plain,train-resume"], json.dumps(answer.stderr)
