"""Every wrong input ends in one line that names the place and in the documented exit code, and runs no code."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llamahome.cli import main
from llamahome.training.rundir import RunFolder

ROWS = [{"instruction": f"Name the number {n}.", "output": "one two three"[: 3 + n % 9]} for n in range(24)]
LINE = json.dumps(ROWS[0])
BIG = {"instruction": "x", "output": "word " * 99}
QUICK = {
    "processing.compile_mode": "none", "processing.precision": "fp32", "processing.threads": 1, "monitor.sinks": "[]",
    "optimization.max_steps": 2, "optimization.global_batch_size": 4, "training.save_steps": 1, "lora.rank": 4,
}  # fmt: skip


Words = Callable[["Place"], list[str]]


class Place:
    """A folder with a model, and what the commands of a case need in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.base, self.output = folder, model, folder / "run"
        self.finished: Path | None = None  # a run that ended

    def file(self, name: str, content: str | bytes | list[Any]) -> str:
        path = self.folder / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def train(
        self, data: str | None = None, *more: str, config: str | bytes | None = None, **sets: object
    ) -> list[str]:
        words = ["train", data or self.file("rows.jsonl", ROWS), *more]
        if config is not None:
            words += ["--config", self.file("run.yaml", config)]
        given = {"model.name": self.base, "training.output": self.output} | QUICK
        return words + settings(given | {key.replace("__", "."): value for key, value in sets.items()})


def train(*words: str, **sets: Any) -> Words:
    """`llamahome train` of good data with these settings; a callable among them makes its value."""
    return lambda p: p.train(*words, **{key: made(value, p) for key, value in sets.items()})


def data(content: str | bytes | list[Any], name: str = "rows.jsonl", **sets: object) -> Words:
    """`llamahome train` of this data."""
    return lambda p: p.train(p.file(name, content), **sets)


def words(*parts: Any) -> Words:
    return lambda p: [str(made(part, p)) for part in parts]


def made(value: Any, place: Place) -> Any:
    return value(place) if callable(value) else value


def file(name: str, content: str | bytes) -> Callable[[Place], str]:
    return lambda p: p.file(name, content)


def model(change: Callable[[Path], object]) -> Callable[[Place], str]:
    """A copy of the model, changed."""

    def make(place: Place) -> str:
        change(Path(shutil.copytree(place.base, place.folder / "model")))
        return "model"

    return make


def run(change: Callable[[Path], object] = lambda folder: None) -> Callable[[Place], str]:
    """A copy of the finished run, changed."""

    def make(place: Place) -> str:
        assert place.finished is not None
        change(Path(shutil.copytree(place.finished, place.folder / "old")))
        return "old"

    return make


def final(place: Place) -> Path:
    assert place.finished is not None
    return place.finished / "final"


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


def used(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


# exit code, the command, and what its error line says
CASES: dict[str, tuple[Any, ...]] = {
    # the command line
    "no such command": (2, words("trian"), "No such command 'trian'. Did you mean 'train'?; see llamahome --help"),
    "no such option": (2, words("train", "--modle", "x"), "No such option '--modle'. Did you mean '--model'?"),
    "argument missing": (2, words("train-eval", "x"), "Missing argument 'DATA'; see llamahome train-eval --help"),
    "option missing": (2, words("merge", "x"), "Missing option '--output'; see llamahome merge --help"),
    "no such choice": (2, words("merge", "x", "--output", "y", "--dtype", "fp8"), "'--dtype': 'fp8' is not one of"),
    "set without a value": (2, train(None, "--set", "training.epochs"), "training.epochs: no value given"),
    "set an unknown key": (2, train(training__epoch=3), "training.epoch: unknown key; did you mean training.epochs?"),
    "set in an unknown section": (2, train(trainig__seed=3), "trainig.seed: unknown section"),
    # the configuration
    "unknown key": (2, train(config="training:\n  epochs: 1\n  max_stepz: 3\n"), "run.yaml:3: training.max_stepz: unk"),
    "wrong type": (2, train(config="training:\n  epochs: '3'\n"), "run.yaml:2: training.epochs: expected a whole nu"),
    "wrong value": (2, train(config="data:\n  overflow: cut\n"), "run.yaml:2: data.overflow: expected one of trun"),
    "conflicting aliases": (
        2, train(config="data:\n  batch_size: 2\ntraining:\n  batch_size: 4\n"),
        "run.yaml:2: data.batch_size: got 2, but run.yaml:4 has training.batch_size: 4",
    ),
    "a key twice": (2, train(config="training:\n  epochs: 1\n  epochs: 2\n"), "first in line 2; run.yaml:3:3"),
    "a tag that runs code": (
        2, train(config='training:\n  epochs: !!python/object/apply:os.system ["touch canary"]\n'),
        "os.system' is not supported; run.yaml:2:11",
    ),
    "an empty configuration": (2, train(config=""), "the file is empty; run.yaml:1:1"),
    "a list at the top": (2, train(config="- 1\n"), "expected sections at the top, found a list; run.yaml:1:1"),
    "a tab": (2, train(config="training:\n\tepochs: 1\n"), "a tab in the indentation; run.yaml:2"),
    "not UTF-8": (2, train(config=b"training: {method: \xff}\n"), "not UTF-8: byte 0xff; run.yaml:1:20"),
    "no such configuration": (2, words("train", "x", "--config", "none.yaml"), "no such", "/none.yaml; check the path"),
    "remote code by file": (2, train(config="model:\n  trust_remote_code: true\n"), "run.yaml:2: model.trust_remote"),
    "batch size 0": (2, train(training__batch_size=0), "training.batch_size: expected a whole number >= 1"),
    "accumulation 0": (2, train(training__gradient_accumulation=0), "training.gradient_accumulation: expected a w"),
    "max_steps 0": (2, train(optimization__max_steps=0), "optimization.max_steps: expected a whole number >= 1"),
    "unknown loss": (2, train(training__loss="focal"), "unknown 'focal'; training.loss; choose one of cross_entropy"),
    "unknown callback": (2, train(training__callbacks="[nowhere:f]"), "'nowhere:f': No module", "training.callbacks"),
    "unknown optimizer": (2, train(optimization__optimizer="adamm"), "optimizer: expected one of", "mean adamw?"),
    "unknown target module": (2, train(lora__target_modules="[q_prj]"), "'q_prj'; lora.target_modules; did you mean"),
    # the data
    "no such data": (3, train("none.jsonl"), "no such file or folder: ", "/none.jsonl; working folder "),
    "empty data": (3, data(""), "the file is empty; rows.jsonl"),
    "blank lines only": (3, data("\n\n \n"), "the file is empty; rows.jsonl"),
    "an empty folder": (3, lambda p: ((p.folder / "none").mkdir(), p.train("none"))[1], "no data files; none"),
    "invalid JSON": (3, data(f"{LINE}\n{{'a'}}\n{LINE}\n"), "invalid JSON at column 2: ", "rows.jsonl:2; mend the row"),
    "a last line cut off": (3, data(f"{LINE}\n{LINE[:20]}"), "the last line may be cut off: ", "rows.jsonl:2"),
    "mixed schemas": (3, data([*ROWS, {"question": "a", "answer": "b"}]), "question, ", "in line 1; rows.jsonl:25"),
    "a row that is a list": (3, data([ROWS[0], [1, 2]]), "the row is a list, not an object; rows.jsonl:2"),
    "a field of the wrong type": (3, data([{"instruction": 5, "output": "x"}]), "a number", "rows.jsonl:1:instruction"),
    "invalid UTF-8": (3, data(b'{"text": "a"}\n{"text": "\xff"}\n'), "0xff at byte 11", "rows.jsonl:2"),
    "UTF-16": (3, data(LINE.encode("utf-16")), "looks like UTF-16; rows.jsonl; convert it: iconv"),
    "half a surrogate": (3, data('{"text": "a \\ud800 b"}\n'), "U+D800 at position 3; rows.jsonl:1:text"),
    "NUL in a text": (3, data('{"text": "a \\u0000 b"}\n'), "a NUL character at position 3; rows.jsonl:1:text"),
    "ragged CSV": (3, data("prompt,completion\na,b\na,b,c\n", "rows.csv"), "where the header has 2; rows.csv:3"),
    "wrong delimiter": (3, data("prompt;completion\na;b\n", "rows.csv"), "rows.csv:1; set data.delimiter: ';'"),
    "an open quote": (3, data('prompt,completion\na,"b\n', "rows.csv"), "never closed; rows.csv:2"),
    "no header": (3, data("how are you,fine\nwho,me\n", "rows.csv"), "rows.csv:2; the first line must name the col"),
    "unknown extension": (3, data("text", "rows.docx"), "unknown format '.docx'; rows.docx; known are .csv"),
    "nothing to train on": (3, data([{"messages": [{"role": "user", "content": "a"}]}]), "nothing", "rows.jsonl:1"),
    "empty answers": (3, data([{"prompt": "a", "completion": ""}]), "is empty; rows.jsonl:1:completion"),
    "a sample too long": (
        3, data([*ROWS, BIG], data__overflow="error", data__max_length=64), "data.max_length: 64; rows.jsonl:25"
    ),
    # the model
    "no such model": (4, train(model__name="./none"), "no such model folder or file; ", "/none; check the path"),
    "an empty model folder": (4, train(model__name=model(empty)), "no config.json; ", "/model; name a model folder"),
    "damaged weights": (
        4, train(model__name=model(lambda f: os.truncate(f / "model.safetensors", 99))),
        "the file ends within its header; ", "/model/model.safetensors; ",
    ),
    "a weight missing": (4, train(model__name=model(without_norm)), "1 missing from the file (model.norm.weight); "),
    "more layers": (4, train(model__name=model(lambda f: edit(f, num_hidden_layers=3))), "9 missing from", "/model;"),
    "a pickle": (4, train(model__name=model(only_pickle)), "pickles, which can run code; ", "/pytorch_model.bin; "),
    "a pickle with code, allowed": (4, train(None, "--allow-pickle", model__name=model(only_pickle)), "/model; "),
    "remote code": (4, train(model__name=model(own_code)), "Python code (own.Model, own.Config); ", ": auto_map; "),
    "another model's tokenizer": (4, train(model__tokenizer=model(more_tokens)), "ids up to 571", "/model; use the"),
    "no GGUF": (4, train(model__name=file("x.gguf", b"GGML" + bytes(64))), "it begins with b'GGML'; x.gguf; "),
    "a GGUF cut off": (4, train(model__name=file("x.gguf", b"GGUF\3\0\0\0" + b"\xff" * 20)), "; x.gguf; "),
    "a hub id without a network": (4, train(model__name="nobody/nothing"), "'nobody/nothing' is no local folder"),
    "adapter of another base": (
        4, words("train-eval", final, file("rows.jsonl", LINE), "--model", model(other_weights)),
        "the adapter was trained on another base", "/final; name that base with --model",
    ),
    "merge of what is no adapter": (4, words("merge", lambda p: p.base, "--output", "x"), "no adapter_config.json; "),
    # checkpoints
    "resume nowhere": (4, words("train-resume", "none"), "no such folder; ", "/none; name a run or checkpoint folder"),
    "resume a file": (4, words("train-resume", file("x", "")), "no such folder; ", "/x; name a run or"),
    "resume a model": (4, words("train-resume", lambda p: p.base), "it holds no checkpoint-N folder; "),
    "a run without run.json": (
        4, words("train-resume", run(lambda r: (r / "run.json").unlink())), "run.json is missing or damaged; ", "/old; "
    ),
    "a run without checkpoints": (
        4, words("train-resume", run(lambda r: [shutil.rmtree(c) for c in r.glob("checkpoint-*")])),
        "it holds no checkpoint-N folder; ", "/old; ",
    ),
    "all checkpoints damaged": (
        4, words("train-resume", run(lambda r: damage(r, "checkpoint-1", "checkpoint-2"))),
        "checkpoint-2: optimizer.safetensors is damaged (SHA-256 differs); checkpoint-1: optimizer.saf", "/old; ",
    ),
    "a checkpoint of another model": (
        4, words("train-resume", run(), "--set", lambda p: f"model.name={model(other_weights)(p)}"),
        "the model is not the run's: ", "/old/checkpoint-2; name the run's model",
    ),
    "a checkpoint of other data": (
        4, words("train-resume", run(more_data), "--set", "data.path=rows.jsonl"),
        "the data is not the run's: ", "/old/checkpoint-2; put the run's data back",
    ),
    "a checkpoint of another optimizer": (
        4, words("train-resume", run(), "--set", "optimization.optimizer=sgd"),
        "the optimizer's state is AdamW's, not SGD's; ", "/old/checkpoint-2; ",
    ),
    "a checkpoint of another rank": (
        4, words("train-resume", run(), "--set", "lora.rank=8"), "the adapter does not fit the model: ",
        "lora_A.weight is [4, 128] instead of [8, 128]", "/old/checkpoint-2; ",
    ),
    # memory
    "a limit below what is in use": (5, train(training__memory_limit="20MB"), "20.0 MB is below ", "; training.mem"),
    "a model that does not fit": (
        5, train(training__memory_limit="2GB", lora__rank=300_000), "may be used; training.memory_limit; raise"
    ),
    # storage
    "a file in the way": (6, train(training__output=file("x", "")), "cannot write: File exists; x; a file or folder"),
    "a file for a parent": (6, train(training__output=lambda p: p.file("x", "") + "/y"), "Not a directory; x/y; a"),
    "an output that holds files": (2, train(training__output=model(used)), "already holds files; ", "/model; choose"),
    "a merge onto files": (2, words("merge", final, "--output", lambda p: p.base), "the output is not empty; "),
    # hardware
    "a GPU that is not there": (9, train(processing__device="cuda:7"), "cuda:7 asked for, ", "; processing.device; "),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llamahome.config import Config
    from llamahome.training.run import train

    place = Place(tmp_path_factory.mktemp("finished"), tiny_model_dir)
    data = place.folder / place.file("rows.jsonl", ROWS)
    given = {"data.path": data, "cache.dir": place.folder / "cache", "model.name": tiny_model_dir}
    given |= QUICK | {"training.output": place.output}
    words = [f"{key}={value}" for key, value in given.items()]
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

    def call(words: list[str]) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["llamahome", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err.splitlines()

    yield call
    log.handlers[:], log.level, log.propagate = before
    log.setLevel(before[1])


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_the_place(name: str, place: Place, command: Any) -> None:
    code, words, *says = CASES[name]
    found, _, lines = command(words(place))
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:]
    assert [part for part in says if part not in errors[0]] == []
    assert "Traceback" not in "".join(lines)
    assert found == code
    assert not (place.folder / "canary").exists()


def test_every_fault_of_a_configuration_is_a_line(place: Place, command: Any) -> None:
    words = place.train(config="training:\n  epochs: 0\n  max_stepz: 3\nlr: fast\n")
    code, _, lines = command(words)
    assert code == 2
    assert [line.split(": ")[:2] for line in lines] == [["error", f"run.yaml:{n}"] for n in (2, 3, 4)]
    assert not place.output.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + LINE.encode() + b"\n"),
        ("crlf.jsonl", LINE.encode() + b"\r\n\r\n" + LINE.encode() + b"\r\n"),
        ("crlf.csv", b"prompt,completion\r\na,b\r\n"),
        ("separator.jsonl", '{"prompt": "a\u2028b", "completion": "NA"}\n'.encode()),
    ],
    ids=["a BOM", "CRLF in JSON Lines", "CRLF in CSV", "U+2028 and NA"],
)
def test_what_only_looks_wrong_is_read(name: str, content: bytes, place: Place, command: Any) -> None:
    place.file(name, content)
    code, out, lines = command(["data", "check", name, "--model", str(place.base), "--set", "data.validation_split=0"])
    assert code == 0, lines
    assert f"rows: {2 if name == 'crlf.jsonl' else 1}" in out


def test_a_run_that_failed_before_it_began_is_no_obstacle(place: Place, command: Any) -> None:
    assert command(place.train("none.jsonl"))[0] == 3
    assert json.loads((place.output / "status.json").read_text())["state"] == "failed"
    assert command(place.train())[0] == 0
    assert command(place.train())[0] == 2


def test_a_refused_resume_leaves_the_run_as_it_was(place: Place, command: Any) -> None:
    old = place.folder / run(more_data)(place)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file() and path.name != "status.json"}
    assert command(["train-resume", "old/checkpoint-1", "--set", "data.path=rows.jsonl"])[0] == 4
    with RunFolder(old, fresh=False):
        code, _, lines = command(["train-resume", "old/checkpoint-1"])
    assert code == 6
    assert f"the folder is in use by process {os.getpid()} on {socket.gethostname()}" in lines[-1]
    assert {path: path.read_bytes() for path in before} == before
