"""Rows to stores: what is kept, what is counted, what is refused, and when the cache is used."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.config import Config
from llamahome.data import recipe as recipe_module
from llamahome.data.cache import Cache
from llamahome.data.interrupt import stop_at_once
from llamahome.data.prepare import is_held_out, prepare
from llamahome.data.report import unpack_place
from llamahome.data.rows import Row
from llamahome.data.schemas import Sample, SchemaReader
from llamahome.data.store import TokenStore
from llamahome.data.templates import Renderer
from llamahome.errors import DataError, Interrupted, StorageError
from llamahome.training.signals import StopSignal


def test_stores_hold_the_renderers_tokens_and_their_places(data, tiny_tokenizer, config, pair, documents):
    prepared = prepare(data, tiny_tokenizer, config=config())
    samples = [SchemaReader(config().data).read(Row(pair(f"What is {i}?", f"It is {i}."), "", i)) for i in range(40)]
    expected = Renderer(tiny_tokenizer, config().data).encode(samples)
    assert documents(prepared.train) == [(item.ids.tolist(), item.trained.tolist()) for item in expected]
    places = [prepared.report.place(unpack_place(prepared.train.source(i))) for i in range(40)]
    assert places == [f"{data}:{i + 1}" for i in range(40)]
    report = prepared.report
    assert (report.rows, report.train.samples, report.validation.samples, report.schemas) == (40, 40, 0, {0: "prompt"})
    assert report.train.tokens == prepared.train.num_tokens
    assert report.train.trained_tokens == prepared.train.num_trained
    assert report.longest[0] == max(prepared.train.lengths())
    assert sum(report.lengths.values()) == 40
    assert prepared.validation is None


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_the_tokens(data, tiny_tokenizer, workers, monkeypatch, config, documents):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    prepared = prepare(
        data, tiny_tokenizer, config=config(data__num_workers=workers, cache__dir=f"{data.parent}/{workers}")
    )
    again = prepare(data, tiny_tokenizer, config=config())
    assert documents(prepared.train) == documents(again.train)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def tokenised(caplog) -> int:
    count = caplog.text.count("tokenising ")
    caplog.clear()
    return count


def test_the_second_time_comes_from_the_cache(data, tiny_tokenizer, caplog, tmp_path, config):
    caplog.set_level("INFO")
    first = prepare(data, tiny_tokenizer, config=config())
    assert tokenised(caplog) == 1
    moved = data.rename(tmp_path / "moved.jsonl")
    second = prepare(moved, copy.deepcopy(tiny_tokenizer), config=config(training__seed=1))
    assert tokenised(caplog) == 0
    assert second.train.fingerprint == first.train.fingerprint
    assert second.report.files == [str(moved)]
    assert second.report.place(second.report.longest[1]).startswith(f"{moved}:")


def test_anything_that_changes_the_tokens_makes_them_anew(data, tiny_tokenizer, caplog, config):
    caplog.set_level("INFO")
    prepare(data, tiny_tokenizer, config=config())
    tokenised(caplog)
    changes = {
        "data__max_length": 20, "data__train_on": "all", "data__overflow": "drop",
        "data__validation_split": 0.5, "data__on_bad_row": "skip", "data__on_empty": "skip",
        "data__max_row_bytes": 1000,
    }  # fmt: skip
    other_template = copy.deepcopy(tiny_tokenizer)
    other_template.chat_template = "{{ '\n' }}" + tiny_tokenizer.chat_template
    other_tokens = copy.deepcopy(tiny_tokenizer)
    other_tokens.add_tokens(["What"])
    for change, value in changes.items():
        prepare(data, tiny_tokenizer, config=config(**{change: value}))
        assert tokenised(caplog) == 1, change
    for tokenizer in (other_template, other_tokens):
        prepare(data, tokenizer, config=config())
        assert tokenised(caplog) == 1
    status = data.stat()
    data.write_text(data.read_text().replace("It is 7", "It is 8"))
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    prepared = prepare(data, tiny_tokenizer, config=config())
    assert tokenised(caplog) == 1, "same size and time, other content"
    assert "It is 8" in tiny_tokenizer.decode(prepared.train.document(7)[0].tolist())


def test_a_file_that_changes_between_key_and_reading_is_noticed(data, tiny_tokenizer, monkeypatch, config, pair):
    key = recipe_module.Recipe.key

    def change(job):
        found = key(job)
        data.write_text(data.read_text() + json.dumps(pair("x")) + "\n")
        return found

    monkeypatch.setattr(recipe_module.Recipe, "key", change)
    with pytest.raises(DataError, match="the file changed while it was being read"):
        prepare(data, tiny_tokenizer, config=config())
    assert Cache.from_config(config()).entries() == []


def damage(folder: Path, how: str) -> None:
    shard = next(folder.glob("train/shard-*"))
    content = bytearray(shard.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif how == "truncate":
        shard.write_bytes(content[:-3])
    elif how == "gone":
        shard.unlink()
    elif how == "report":
        (folder / "report.json").write_text('{"files": []')
    else:
        (folder / "report.json").write_text("{}")


@pytest.mark.parametrize("how", ["flip", "truncate", "gone", "report", "empty report"])
@pytest.mark.parametrize("in_use", [False, True])
def test_damaged_cache_entries_are_made_again(data, tiny_tokenizer, caplog, how, in_use, config, documents):
    good = prepare(data, tiny_tokenizer, config=config())
    expected, folder = documents(good.train), good.train.folder.parent
    if not in_use:
        good.close()
    damage(folder, how)
    again = prepare(data, tiny_tokenizer, config=config())
    assert documents(again.train) == expected
    assert caplog.text.count("the cached tokens are damaged and are made again") == 1
    assert (again.train.folder.parent == folder) is not in_use


def test_an_unusable_cache_folder_costs_a_warning_only(data, tiny_tokenizer, tmp_path, caplog, config):
    (tmp_path / "file").touch()
    prepared = prepare(data, tiny_tokenizer, config=config(cache__dir=str(tmp_path / "file")))
    assert len(prepared.train) == 40
    assert caplog.text.count("the cache is not used") == 1


def test_tokens_can_be_written_to_a_folder(data, tiny_tokenizer, tmp_path, config):
    output = tmp_path / "out" / "tokens"
    prepared = prepare(data, tiny_tokenizer, config=config(), output=output)
    assert len(TokenStore.open(output / "train")) == len(prepared.train) == 40
    assert Cache.from_config(config()).entries() == []
    assert json.loads((output / "report.json").read_text())["report"]["train"]["samples"] == 40
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        prepare(data, tiny_tokenizer, config=config(), output=tmp_path / "file" / "tokens")


KILLED = """
import sys, time
from llamahome.config import Config
from llamahome.data import journal, prepare as module
from tests_tokenizer import tokenizer
add = journal._Blocks.add
def slow(writer, document):
    time.sleep(0.1)
    add(writer, document)
journal._Blocks.add = slow
print("ready", flush=True)
module.prepare(sys.argv[1], tokenizer(), config=Config.load(None, {"data.validation_split": 0.5}))
"""


def test_a_killed_preparation_leaves_nothing_half_done(data, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tests_tokenizer.py").write_text(
        f"def tokenizer():\n    from transformers import AutoTokenizer\n"
        f"    return AutoTokenizer.from_pretrained({str(tmp_path / 'tokenizer')!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    cache = Cache.from_config(Config())
    for delay in (0.02, 0.1):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(data)], stdout=subprocess.PIPE, env=environment)
        process.stdout.readline()
        deadline = time.monotonic() + 120
        while not list(cache.folder.glob(".*.tmp-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert cache.entries() == []
        assert list(cache.folder.glob(".*.tmp-*"))
    prepared = prepare(data, tiny_tokenizer, config=Config.load(None, {"data.validation_split": 0.5}))
    assert prepared.validation is not None
    assert len(prepared.train) + len(prepared.validation) == 40
    prepared.train.verify()
    cache.clean()
    assert not list(cache.folder.glob(".*.tmp-*"))


# The validation split


def text_of(store: TokenStore, tokenizer) -> set[str]:
    return {tokenizer.decode(store.document(i)[0].tolist()) for i in range(len(store))}


def test_appending_rows_moves_none(tmp_path, tiny_tokenizer, config, pair, jsonl):
    rows = [pair(f"What is {i}?") for i in range(120)]
    sides = []
    for count in (60, 120):
        path = jsonl(tmp_path / f"{count}.jsonl", rows[:count])
        prepared = prepare(path, tiny_tokenizer, config=config(data__validation_split=0.3))
        sides.append((text_of(prepared.train, tiny_tokenizer), text_of(prepared.validation, tiny_tokenizer)))
    (train, validation), (more_train, more_validation) = sides
    assert train < more_train
    assert validation < more_validation
    assert 0.1 < len(more_validation) / 120 < 0.5


sample_texts = st.text(min_size=1, max_size=20)


@given(texts=st.lists(sample_texts, min_size=1, max_size=50), share=st.floats(0, 0.99))
def test_a_samples_side_depends_on_its_content_alone(texts, share):
    sides = {}
    for line, text in enumerate(texts * 2):
        sample = Sample(f"file {line}", line, "text", text=text.encode("utf-8", "replace").decode())
        assert sides.setdefault(sample.text, is_held_out(sample, share)) == is_held_out(sample, share)
        assert is_held_out(sample, share) <= is_held_out(sample, min(share + 0.1, 1.0)), (
            "a larger share takes no one out"
        )


def test_the_split_has_the_share_that_was_asked_for():
    samples = [Sample("f", i, "text", text=f"text {i}") for i in range(20_000)]
    for share in (0.0, 0.01, 0.1, 0.5):
        found = sum(is_held_out(sample, share) for sample in samples) / len(samples)
        assert abs(found - share) <= 4 * (share * (1 - share) / len(samples)) ** 0.5


def test_duplicates_are_counted_and_stay_together(tmp_path, tiny_tokenizer, caplog, config, pair, jsonl):
    rows = [pair(f"What is {i % 30}?") for i in range(90)]
    prepared = prepare(jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer, config=config(data__validation_split=0.4))
    train, validation = text_of(prepared.train, tiny_tokenizer), text_of(prepared.validation, tiny_tokenizer)
    assert not train & validation
    assert len(train | validation) == 30
    assert prepared.report.duplicates == 60
    assert "samples that repeat another: 60" in caplog.text


def test_evaluation_data_replaces_the_split(data, tmp_path, tiny_tokenizer, caplog, config, pair, jsonl):
    other = jsonl(tmp_path / "eval.jsonl", [pair("What is 3?", "It is 3."), pair("new?")])
    prepared = prepare(data, tiny_tokenizer, config=config(data__validation_split=0.3), eval_data=other)
    assert (len(prepared.train), len(prepared.validation)) == (40, 2)
    assert prepared.report.place(unpack_place(prepared.validation.source(1))) == f"{other}:2"
    assert prepared.report.leaked == 1
    assert "evaluation samples that are trained on, too: 1" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_a_preparation(tmp_path, tiny_tokenizer, number, config, pair, jsonl):
    """In a run its handler only takes a note, which is read when a step ends."""
    data = jsonl(tmp_path / "data.jsonl", [pair(f"What is {i}?", "It is four. " * 50) for i in range(20_000)])
    with StopSignal() as signals:
        handler = signal.getsignal(number)
        timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
        timer.start()
        with pytest.raises(Interrupted, match=r"while data was prepared.*run the same command again") as caught:
            prepare(data, tiny_tokenizer, config=config())
        assert signal.getsignal(number) == handler
        assert signals.stop is None
    assert caught.value.exit_code == 128 + number
    cache = Cache.from_config(config())
    assert [path.name for path in cache.folder.iterdir() if path.is_dir()] == []


def test_without_handlers_of_a_run_signals_do_what_they_did():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_at_once():
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
