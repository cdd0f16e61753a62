"""Every wrong input ends in one line that names the place and in the documented exit code, and runs no code."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamahome.cli import main
from llamahome.train.rundir import RunFolder

ROWS = [{"instruction": f"Name the number {n}.", "output": "one two three"[: 3 + n % 9]} for n in range(24)]
LINE = json.dumps(ROWS[0])
BIG = {"instruction": "x", "output": "word " * 99}
QUICK = {
    "processing.compile_mode": "none", "processing.precision": "fp32", "processing.threads": 1, "monitor.sinks": "[]",
    "optimization.max_steps": 2, "optimization.global_batch_size": 4, "training.save_steps": 1, "lora.rank": 4,
}  # fmt: skip


class Place:
    """A folder with a model, and the words of commands that use what is made in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.base, self.output = folder, model, folder / "run"
        self.finished: Path | None = None  # a run that ended

    def file(self, name: str, content: str | bytes | list[Any]) -> str:
        path = self.folder / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def model(self, change: Callable[[Path], object]) -> str:
        """A copy of the model, changed."""
        folder = Path(shutil.copytree(self.base, self.folder / "model"))
        change(folder)
        return "model"

    def run(self, change: Callable[[Path], object]) -> str:
        """A copy of the finished run, changed."""
        assert self.finished is not None
        shutil.copytree(self.finished, self.folder / "old")
        change(self.folder / "old")
        return "old"

    def train(self, data: str | None = None, *more: str, config: str | bytes | None = None, **sets: object) -> list[str]:
        words = ["train", data or self.file("rows.jsonl", ROWS), *more]
        if config is not None:
            words += ["--config", self.file("run.yaml", config)]
        given = {"model.name": self.base, "training.output": self.output} | QUICK
        return words + settings(given | {key.replace("__", "."): value for key, value in sets.items()})

    def data(self, content: str | bytes | list[Any], name: str = "rows.jsonl", **sets: object) -> list[str]:
        return self.train(self.file(name, content), **sets)


def settings(given: dict[str, object]) -> list[str]:
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


def edit(folder: Path, name: str = "config.json", **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def without_norm(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def other_weights(folder: Path) -> None:
    state = {name: tensor + 0.5 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


class Canary:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))


def own_code(folder: Path) -> None:
    (folder / "own.py").write_text("open('canary', 'w')\n")
    edit(folder, auto_map={"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}, model_type="own")


def more_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra-{n}>" for n in range(60)])
    tokenizer.save_pretrained(folder)


def damage(run: Path, *names: str) -> None:
    for name in names:
        with (run / name / "optimizer.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x99")


def more_data(run: Path) -> None:
    config = json.loads((run / "run.json").read_text())
    path = run.parent / "rows.jsonl"
    path.write_text(Path(config["config"]["data"]["path"]).read_text() + LINE + "\n")


def used(place: Place) -> list[str]:
    (place.folder / "run").mkdir()
    place.file("run/notes.txt", "mine")
    return place.train()


# exit code, the words of the command, what the error line must name
CASES: dict[str, tuple[int, Callable[[Place], list[str]], str]] = {
    # the command line
    "no such command": (2, lambda p: ["trian"], "No such command 'trian'. Did you mean 'train'?; see llamahome --help"),
    "no such option": (2, lambda p: ["train", "--modle", "x"], "No such option '--modle'. Did you mean '--model'?"),
    "argument missing": (2, lambda p: ["train-eval", "x"], "Missing argument 'DATA'; see llamahome train-eval --help"),
    "option missing": (2, lambda p: ["merge", "x"], "Missing option '--output'; see llamahome merge --help"),
    "no such choice": (2, lambda p: ["merge", "x", "--output", "y", "--dtype", "fp8"], "'--dtype': 'fp8' is not one"),
    "set without a value": (2, lambda p: p.train(None, "--set", "training.epochs"), "training.epochs: no value given"),
    "set an unknown key": (2, lambda p: p.train(training__epoch=3), "training.epoch: unknown key; did you mean"),
    "set in an unknown section": (2, lambda p: p.train(trainig__seed=3), "trainig.seed: unknown section"),
    # the configuration
    "unknown key": (2, lambda p: p.train(config="training:\n  epochs: 1\n  max_stepz: 3\n"), "run.yaml:3: training.max"),
    "wrong type": (2, lambda p: p.train(config="training:\n  epochs: '3'\n"), "run.yaml:2: training.epochs: expected a"),
    "wrong value": (2, lambda p: p.train(config="data:\n  overflow: cut\n"), "run.yaml:2: data.overflow: expected one"),
    "conflicting aliases": (
        2, lambda p: p.train(config="data:\n  batch_size: 2\ntraining:\n  batch_size: 4\n"),
        "run.yaml:4: training.batch_size: got 4, but run.yaml:2 has data.batch_size: 2",
    ),
    "a key twice": (2, lambda p: p.train(config="training:\n  epochs: 1\n  epochs: 2\n"), "run.yaml:3"),
    "a tag that runs code": (
        2, lambda p: p.train(config='training:\n  epochs: !!python/object/apply:os.system ["touch canary"]\n'),
        "run.yaml:2",
    ),
    "a configuration of nothing": (2, lambda p: p.train(config=""), "run.yaml"),
    "a list at the top": (2, lambda p: p.train(config="- 1\n"), "run.yaml:1"),
    "a tab": (2, lambda p: p.train(config="training:\n\tepochs: 1\n"), "run.yaml:2"),
    "not UTF-8": (2, lambda p: p.train(config=b"training: {method: \xff}\n"), "run.yaml"),
    "no such configuration": (2, lambda p: ["train", "x", "--config", "none.yaml"], "none.yaml"),
    "remote code by file": (2, lambda p: p.train(config="model:\n  trust_remote_code: true\n"), "run.yaml:2"),
    "batch size 0": (2, lambda p: p.train(training__batch_size=0), "training.batch_size: expected"),
    "accumulation 0": (2, lambda p: p.train(training__gradient_accumulation=0), "gradient_accumulation: expected"),
    "max_steps 0": (2, lambda p: p.train(optimization__max_steps=0), "optimization.max_steps: expected"),
    "unknown loss": (2, lambda p: p.train(training__loss="focal"), "'focal'; training.loss"),
    "unknown callback": (2, lambda p: p.train(training__callbacks="[nowhere:f]"), "'nowhere:f': No module named"),
    "unknown optimizer": (2, lambda p: p.train(optimization__optimizer="adamm"), "optimizer: expected one of adamw"),
    "unknown target module": (2, lambda p: p.train(lora__target_modules="[q_prj]"), "lora.target_modules"),
    # the data
    "no such data": (3, lambda p: p.train("none.jsonl"), "none.jsonl"),
    "empty data": (3, lambda p: p.data(""), "empty; rows.jsonl"),
    "blank lines only": (3, lambda p: p.data("\n\n \n"), "rows.jsonl"),
    "an empty folder": (3, lambda p: ((p.folder / "none").mkdir(), p.train("none"))[1], "no data files; none"),
    "invalid JSON": (3, lambda p: p.data(f"{LINE}\n{{'a'}}\n{LINE}\n"), "invalid JSON at column 2"),
    "a last line cut off": (3, lambda p: p.data(f"{LINE}\n{LINE[:20]}"), "the last line may be cut off"),
    "mixed schemas": (3, lambda p: p.data([*ROWS, {"question": "a", "answer": "b"}]), "rows.jsonl:25"),
    "a row that is a list": (3, lambda p: p.data([ROWS[0], [1, 2]]), "the row is a list, not an object; rows.jsonl:2"),
    "a field of the wrong type": (3, lambda p: p.data([{"instruction": 5, "output": "x"}]), "rows.jsonl:1:instruction"),
    "invalid UTF-8": (3, lambda p: p.data(b'{"text": "a"}\n{"text": "\xff"}\n'), "rows.jsonl:2"),
    "UTF-16": (3, lambda p: p.data(LINE.encode("utf-16")), "looks like UTF-16"),
    "half a surrogate": (3, lambda p: p.data('{"text": "a \\ud800 b"}\n'), "rows.jsonl:1:text"),
    "NUL in a text": (3, lambda p: p.data('{"text": "a \\u0000 b"}\n'), "rows.jsonl:1:text"),
    "ragged CSV": (3, lambda p: p.data("prompt,completion\na,b\na,b,c\n", "rows.csv"), "rows.csv:3"),
    "wrong delimiter": (3, lambda p: p.data("prompt;completion\na;b\n", "rows.csv"), "set data.delimiter: ';'"),
    "an open quote": (3, lambda p: p.data('prompt,completion\na,"b\n', "rows.csv"), "rows.csv:2"),
    "no header": (3, lambda p: p.data("how are you,fine\nwho,me\n", "rows.csv"), "rows.csv"),
    "unknown extension": (3, lambda p: p.data("text", "rows.docx"), "unknown format '.docx'; rows.docx"),
    "nothing to train on": (3, lambda p: p.data([{"messages": [{"role": "user", "content": "a"}]}]), "rows.jsonl:1"),
    "empty answers": (3, lambda p: p.data([{"prompt": "a", "completion": ""}]), "rows.jsonl:1"),
    "a sample too long": (
        3, lambda p: p.data([*ROWS, BIG], data__overflow="error", data__max_length=64), "rows.jsonl:25"
    ),
    # the model
    "no such model": (4, lambda p: p.train(model__name="./none"), "no such model folder or file; "),
    "an empty model folder": (4, lambda p: p.train(model__name=p.model(empty)), "no config.json; "),
    "damaged weights": (
        4, lambda p: p.train(model__name=p.model(lambda f: os.truncate(f / "model.safetensors", 99))),
        "model.safetensors",
    ),
    "a weight missing": (4, lambda p: p.train(model__name=p.model(without_norm)), "model.norm.weight"),
    "more layers": (4, lambda p: p.train(model__name=p.model(lambda f: edit(f, num_hidden_layers=3))), "missing from"),
    "a pickle": (4, lambda p: p.train(model__name=p.model(only_pickle)), "pytorch_model.bin; convert them"),
    "a pickle with code, allowed": (
        4, lambda p: p.train(None, "--allow-pickle", model__name=p.model(only_pickle)), "model"
    ),
    "remote code": (4, lambda p: p.train(model__name=p.model(own_code)), "config.json: auto_map"),
    "another model's tokenizer": (4, lambda p: p.train(model__tokenizer=p.model(more_tokens)), "ids up to 571"),
    "no GGUF": (4, lambda p: p.train(model__name=p.file("x.gguf", b"GGML" + bytes(64))), "x.gguf"),
    "a GGUF cut off": (4, lambda p: p.train(model__name=p.file("x.gguf", b"GGUF\3\0\0\0" + b"\xff" * 20)), "x.gguf"),
    "a hub id without a network": (4, lambda p: p.train(model__name="nobody/nothing"), "'nobody/nothing' is no local"),
    "adapter of another base": (
        4, lambda p: ["train-eval", str(p.finished / "final"), p.file("rows.jsonl", ROWS), "--model",
                      p.model(other_weights)],
        "trained on another base",
    ),
    "merge of what is no adapter": (4, lambda p: ["merge", str(p.base), "--output", "x"], "no adapter_config.json"),
    # checkpoints
    "resume nowhere": (4, lambda p: ["train-resume", "none"], "no such folder; "),
    "resume a file": (4, lambda p: ["train-resume", p.file("x", "")], "no such folder; "),
    "resume a model": (4, lambda p: ["train-resume", str(p.base)], "it holds no checkpoint-N folder; "),
    "a run without run.json": (
        4, lambda p: ["train-resume", p.run(lambda r: (r / "run.json").unlink())], "run.json is missing or damaged"
    ),
    "a run without checkpoints": (
        4, lambda p: ["train-resume", p.run(lambda r: [shutil.rmtree(c) for c in r.glob("check*")])], "holds no check"
    ),
    "all checkpoints damaged": (
        4, lambda p: ["train-resume", p.run(lambda r: damage(r, "checkpoint-1", "checkpoint-2"))],
        "checkpoint-2: optimizer.safetensors is damaged (SHA-256 differs); checkpoint-1: optimizer.saf",
    ),
    "a checkpoint of another model": (
        4, lambda p: ["train-resume", p.run(lambda r: None), "--set", f"model.name={p.model(other_weights)}"],
        "the model is not the run's",
    ),
    "a checkpoint of other data": (
        4, lambda p: ["train-resume", p.run(more_data), "--set", "data.path=rows.jsonl"], "the data is not the run's"
    ),
    "a checkpoint of another optimizer": (
        4, lambda p: ["train-resume", p.run(lambda r: None), "--set", "optimization.optimizer=sgd"],
        "the optimizer's state is AdamW's, not SGD's",
    ),
    "a checkpoint of another rank": (
        4, lambda p: ["train-resume", p.run(lambda r: None), "--set", "lora.rank=8"], "does not fit the model"
    ),
    # memory
    "a limit below what is in use": (5, lambda p: p.train(training__memory_limit="20MB"), "training.memory_limit"),
    "a limit too small for a sample": (
        5, lambda p: p.data([BIG] * 8, training__memory_limit="250MB", lora__rank=512), "training.memory_limit"
    ),
    # storage
    "a file in the way": (6, lambda p: p.train(training__output=p.file("x", "")), "File exists; x"),
    "a file for a parent": (6, lambda p: p.train(training__output=p.file("x", "") + "/run"), "x/run"),
    "an output that holds files": (2, used, "the output folder already holds files; "),
    "a merge onto files": (2, lambda p: ["merge", str(p.finished / "final"), "--output", str(p.base)], "not empty; "),
    # hardware
    "a GPU that is not there": (9, lambda p: p.train(processing__device="cuda:7"), "processing.device"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llamahome.config import Config
    from llamahome.train.run import train

    place = Place(tmp_path_factory.mktemp("finished"), tiny_model_dir)
    data = place.folder / place.file("rows.jsonl", ROWS)
    given = {"data.path": data, "cache.dir": place.folder / "cache", "model.name": tiny_model_dir}
    words = [f"{key}={value}" for key, value in {**QUICK, **given, "training.output": place.output}.items()]
    return train(Config.load(None, words)).output


@pytest.fixture
def place(tmp_path: Path, tiny_model_dir: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    made = Place(tmp_path, tiny_model_dir)
    made.finished = finished
    return made


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: exit code, stdout, and the lines of stderr."""
    log = logging.getLogger("llamahome")
    before = log.handlers[:], log.level, log.propagate

    def run(words: list[str]) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["llamahome", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err.splitlines()

    yield run
    log.handlers[:], log.level, log.propagate = before
    log.setLevel(before[1])


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_the_place(name: str, place: Place, command: Any) -> None:
    code, words, needle = CASES[name]
    found, _, lines = command(words(place))
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    print(errors[0])
    assert needle in errors[0]
    assert lines[-1] == errors[0]
    assert "Traceback" not in "".join(lines)
    assert found == code
    assert not (place.folder / "canary").exists()
