"""`llamahome data prepare` and `llamahome data verify` as they are typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llamahome.cli import cli
from llamahome.data import progress as progress_module
from llamahome.data.prepare import prepare
from llamahome.data.progress import Progress, log_progress, progress_view

COMMAND = """
import sys
from llamahome.data import progress, units
units.MIN_PART_UNIT_BYTES = 2000
progress._LINE_SECONDS = 0.0
from llamahome.cli import main
sys.argv = ["llamahome", *sys.argv[1:]]
main()
"""


def llamahome(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prepare_says_what_it_found_and_verify_finds_damage(data, tiny_model_dir, tmp_path):
    done = llamahome("data", "prepare", data, "--output", tmp_path / "out", "--model", tiny_model_dir)
    assert done.returncode == 0, done.stderr
    assert "rows: 200" in done.stdout
    assert re.search(r"100% of \S+ \S+, [\d,]+ rows/s, [\d,]+ tokens/s, 0:00:00 left", done.stderr)
    good = llamahome("data", "verify", tmp_path / "out")
    assert good.returncode == 0
    assert re.fullmatch(rf"{tmp_path}/out: 200 documents in .*, all good\n", good.stdout)
    shard = tmp_path / "out" / "train" / "shard-00000.tokens"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 4
    shard.write_bytes(content)
    bad = llamahome("data", "verify", tmp_path / "out", tmp_path)
    assert bad.returncode == 3
    faults = bad.stderr.splitlines()
    assert len(faults) == 2
    assert re.match(rf"error: .*; {shard}: byte 4096; ", faults[0])
    assert faults[1].startswith("error: the folder holds no prepared data; ")


def test_parts(data, tiny_model_dir, tmp_path):
    for part in ("1/2", "2/2"):
        output = tmp_path / part[0]
        done = llamahome("data", "prepare", data, "--output", output, "--model", tiny_model_dir, "--shard", part)
        assert done.returncode == 0, done.stderr
    done = llamahome("data", "verify", tmp_path / "1", tmp_path / "2")
    counts = [int(number) for number in re.findall(r"(\d+) documents", done.stdout)]
    assert sum(counts) == 200
    assert min(counts) > 0
    run = ["--output", tmp_path / "run", "--model", tiny_model_dir, "--set", "optimization.max_steps=2"]
    done = llamahome("train", f"{tmp_path}/[12]", *run)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final").is_dir()
    assert "tokenising" not in done.stderr
    refused = llamahome(
        "train", f"{tmp_path}/[12]", "--output", tmp_path / "no", *run[2:], "--set", "data.max_length=99"
    )
    assert refused.returncode == 3
    assert "prepared with data.max_length 512, not 99; " in refused.stderr


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2", "١/٢"])
def test_a_wrong_shard_is_refused(data, tmp_path, shard):
    done = CliRunner().invoke(cli, ["data", "prepare", str(data), "--output", str(tmp_path / "out"), "--shard", shard])
    assert done.exit_code == 2
    assert "I/N" in done.output
    assert not (tmp_path / "out").exists()


def test_verify_reads_the_cache(data, tiny_tokenizer):
    with prepare(data, tiny_tokenizer) as prepared:
        folder = prepared.train.folder
    assert CliRunner().invoke(cli, ["data", "verify"]).exit_code == 2
    assert CliRunner().invoke(cli, ["data", "verify", "--cache"]).output.count("all good") == 1
    with (folder / "store.json").open("r+b") as file:
        file.seek(30)
        file.write(b"x")
    done = CliRunner().invoke(cli, ["data", "verify", "--cache"])
    assert done.exit_code == 3
    assert str(folder / "store.json") in done.output


def test_bad_rows_end_a_preparation(data, tiny_model_dir, tmp_path):
    data.write_text(data.read_text() + "{broken\n")
    done = llamahome("data", "prepare", data, "--output", tmp_path / "out", "--model", tiny_model_dir)
    assert done.returncode == 3
    assert f"{data}:201" in done.stderr.splitlines()[-1]


# Progress


def test_the_line_has_rates_share_and_time_left(monkeypatch):
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: 110.0)
    progress = Progress(4_000_000_000, 1_000_000_000, 2_000_000_000, rows=1000, tokens=500_000, began=100.0)
    assert progress.line() == "50% of 4.00 GB, 100 rows/s, 50,000 tokens/s, 0:00:20 left"
    assert "left" not in Progress(10, 5, 5).line()
    assert Progress(0).share == 0


def test_lines_come_every_ten_seconds(monkeypatch, caplog):
    caplog.set_level("INFO", logger="llamahome")
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    show = log_progress()
    for now in (1.0, 9.9, 10.1, 12.0, 20.2):  # noqa: B007 - the clock reads it
        show(Progress(100, began=0.0))
    assert len(caplog.records) == 2


def test_a_terminal_gets_one_line_that_changes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_view() as show:
        show(Progress(100, 0, 50))
    assert "50% of 100 B" in capsys.readouterr().err
