"""Rows that are too long, empty or bad, the check that tells of all of them, and the report."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.data.cache import Cache
from llamahome.data.encoding import Encoded
from llamahome.data.pipeline import split
from llamahome.data.prepare import check, prepare
from llamahome.data.report import DataReport, pack_place, unpack_place
from llamahome.errors import DataError, ModelError


@pytest.fixture
def long_data(tmp_path, pair, jsonl):
    return jsonl(tmp_path / "long.jsonl", [pair("short"), pair("long", "the sea " * 50), pair("short again")])


def test_long_samples_are_cut_dropped_or_refused(long_data, tiny_tokenizer, caplog, config):
    cut = prepare(long_data, tiny_tokenizer, config=config(data__max_length=64))
    assert max(cut.train.lengths()) == 64
    assert cut.report.truncated.count == 1
    assert cut.report.longest[0] > 64, "the histogram shows what was there"
    assert f"samples cut to 64 tokens: 1 ({long_data}:2)" in caplog.text
    dropped = prepare(long_data, tiny_tokenizer, config=config(data__max_length=64, data__overflow="drop"))
    assert (len(dropped.train), dropped.report.dropped.count) == (2, 1)
    assert "samples dropped, longer than 64 tokens: 1" in caplog.text
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match=r"tokens, more than data\.max_length: 64") as caught:
            prepare(
                long_data,
                tiny_tokenizer,
                config=config(data__max_length=64, data__overflow="error", data__on_bad_row=policy),
            )
        assert caught.value.where == f"{long_data}:2"
    chat = prepare(long_data, tiny_tokenizer, config=config(data__max_length=64, data__overflow="split"))
    assert (chat.report.split.count, chat.report.truncated.count) == (0, 1), (
        "answers are never split from their question"
    )


def test_long_texts_are_split_without_losing_a_token(tmp_path, tiny_tokenizer, config, documents):
    path = tmp_path / "book.txt"
    path.write_text("the sea and the old mill " * 100)
    whole = prepare(path, tiny_tokenizer, config=config(data__max_length=4096))
    pieces = prepare(path, tiny_tokenizer, config=config(data__max_length=100, data__overflow="split"))
    [(ids, _)] = documents(whole.train)
    joined = [token for i, (part, _) in enumerate(documents(pieces.train)) for token in part[i > 0 :]]
    assert joined == ids
    assert pieces.train.num_trained == whole.train.num_trained == len(ids) - 1
    assert pieces.report.split.count == 1
    assert max(pieces.train.lengths()) == 100


@given(size=st.integers(1, 60), limit=st.integers(2, 20))
def test_pieces_predict_every_token_but_the_first_once(size, limit):
    tokens = Encoded(np.arange(size, dtype=np.uint32), np.arange(size) > 0)
    pieces = split(tokens, limit)
    predicted = np.concatenate([piece.ids[piece.trained] for piece in pieces])
    assert predicted.tolist() == list(range(1, size))
    assert all(len(piece.ids) <= limit and not piece.trained[0] for piece in pieces)


def test_a_sample_with_nothing_to_train_on_is_refused_or_counted(tmp_path, tiny_tokenizer, caplog, config, pair, jsonl):
    path = jsonl(tmp_path / "a.jsonl", [pair("short"), pair("the sea " * 50)])
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match=r"the first 64 of its .* tokens hold none of the answer") as caught:
            prepare(path, tiny_tokenizer, config=config(data__max_length=64, data__on_bad_row=policy))
        assert caught.value.where == f"{path}:2"
        assert "data.on_empty: skip" in caught.value.fix
    prepared = prepare(path, tiny_tokenizer, config=config(data__max_length=64, data__on_empty="skip"))
    assert (len(prepared.train), prepared.report.empty.count) == (1, 1)
    assert f"samples passed over, nothing to train on: 1 ({path}:2)" in caplog.text


def test_nothing_to_train_on_at_all_is_an_error(tmp_path, tiny_tokenizer, config, pair, jsonl):
    path = jsonl(tmp_path / "a.jsonl", [pair("the sea " * 50)])
    with pytest.raises(DataError, match="nothing to train on: 1 rows gave 0 samples") as caught:
        prepare(path, tiny_tokenizer, config=config(data__max_length=64, data__on_empty="skip"))
    assert caught.value.exit_code == 3
    assert Cache.from_config(config()).entries() == []


def test_bad_rows_are_skipped_and_capped(tmp_path, tiny_tokenizer, caplog, config, pair, jsonl):
    rows = [pair("a"), "broken", pair(""), pair("b"), {"text": "x"}, pair("c")]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="invalid JSON at column 1") as caught:
        prepare(path, tiny_tokenizer, config=config())
    assert caught.value.where == f"{path}:2"
    prepared = prepare(path, tiny_tokenizer, config=config(data__on_bad_row="skip", data__max_bad_rows=3))
    assert (len(prepared.train), prepared.report.rows, prepared.report.bad_rows.count) == (3, 6, 3)
    assert prepared.report.bad_rows.examples == [(0, 2), (0, 3), (0, 5)]
    assert caplog.text.count("row passed over: ") == 3
    with pytest.raises(DataError, match="more than 2 bad rows") as caught:
        prepare(path, tiny_tokenizer, config=config(data__on_bad_row="skip", data__max_bad_rows=2))
    assert caught.value.where.startswith(f"{path}:5")


def test_a_token_outside_the_models_vocabulary_is_refused(data, tiny_tokenizer, config, documents):
    largest = max(max(ids) for ids, _ in documents(prepare(data, tiny_tokenizer, config=config()).train))
    prepare(data, tiny_tokenizer, config=config(), vocab_size=largest + 1)
    with pytest.raises(
        DataError, match=f"token id {largest} is outside.*the tokenizer has 512 tokens, the model {largest}"
    ) as caught:
        prepare(data, tiny_tokenizer, config=config(), vocab_size=largest)
    assert caught.value.where.startswith(f"{data}:")


def test_odd_numbers_of_samples_are_explained(tmp_path, tiny_tokenizer, caplog, config, pair, jsonl):
    path = jsonl(tmp_path / "a.jsonl", [pair("one")])
    for split_share in (0.01, 0.0):
        caplog.clear()
        prepare(path, tiny_tokenizer, config=config(data__validation_split=split_share))
        assert "1 samples are fewer than a step takes (16): each epoch is one smaller step" in caplog.text
        assert ("no sample fell into the validation split" in caplog.text) is bool(split_share)


def test_a_tokenizer_without_template_is_told(tmp_path, tiny_tokenizer, config, jsonl):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        prepare(path, bare, config=config())
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        check(path, bare, config=config())


def test_check_collects_every_fault_with_its_place(tmp_path, tiny_tokenizer, config, pair, jsonl):
    rows = [pair("a"), "broken", pair("", "x"), {"prompt": 5, "completion": "x"}, pair("the sea " * 50), pair("b")]
    first = jsonl(tmp_path / "1.jsonl", rows)
    empty = jsonl(tmp_path / "2.jsonl", [])
    torn = tmp_path / "3.csv"
    torn.write_text("prompt,completion\na,b\nc\n")
    report = check([first, empty, torn], tiny_tokenizer, config=config(data__max_length=64))
    places = [fault.split("; ")[1] for fault in report.faults]
    assert places == [f"{first}:2", f"{first}:3:prompt", f"{first}:4:prompt", str(empty), f"{torn}:3", f"{first}:5"]
    assert report.train.samples == 3
    assert all(fault in report.to_text() for fault in report.faults)
    assert Cache.from_config(config()).entries() == []


def test_check_stops_after_many_faults(tmp_path, tiny_tokenizer, config, jsonl):
    path = jsonl(tmp_path / "a.jsonl", ["broken"] * 3000)
    report = check(path, tiny_tokenizer, config=config())
    assert len(report.faults) == 1001
    assert report.faults[-1] == "stopped after 1,000 faults"


def test_check_collects_what_a_template_refuses(tmp_path, tiny_tokenizer, config, pair, jsonl):
    picky = copy.deepcopy(tiny_tokenizer)
    picky.chat_template = (
        "{% if 'x' in messages[0].content %}{{ raise_exception('no x') }}{% endif %}" + tiny_tokenizer.chat_template
    )
    path = jsonl(tmp_path / "a.jsonl", [pair("a"), pair("x"), pair("b"), pair("xx")])
    report = check(path, picky, config=config())
    assert [f"{path}:{line}" in fault for line, fault in zip((2, 4), report.faults, strict=True)] == [True, True]
    assert report.train.samples == 2
    with pytest.raises(ModelError, match="no x"):
        prepare(path, picky, config=config())


def test_check_shows_what_would_be_trained(tmp_path, tiny_tokenizer, config, pair, jsonl):
    path = jsonl(tmp_path / "a.jsonl", [pair("\x1b[31mred\x1b[0m", "four\nfive")] * 5)
    report = check(path, tiny_tokenizer, config=config())
    assert (
        report.preview
        == ["<|im_start|>user↵\\x1b[31mred\\x1b[0m<|im_end|>↵<|im_start|>assistant↵⟦four↵five<|im_end|>⟧↵"] * 3
    )
    assert "\x1b" not in report.to_text()


def test_check_works_without_a_tokenizer(data, config):
    report = check(data, config=config())
    assert (report.faults, report.rows, report.train.samples, report.train.tokens) == ([], 40, 40, 0)


def test_check_finds_nothing_to_train_on_and_foreign_tokens(data, tiny_tokenizer, config):
    assert "outside the model's vocabulary" in check(data, tiny_tokenizer, config=config(), vocab_size=10).faults[0]
    nothing = check(data, tiny_tokenizer, config=config(data__max_length=2, data__on_empty="skip"))
    assert "nothing to train on" in nothing.faults[0]


# The report


def test_the_report_is_plain_json_and_comes_back(long_data, tiny_tokenizer, config):
    report = prepare(long_data, tiny_tokenizer, config=config(data__max_length=64)).report
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    text = report.to_text()
    for fact in (
        "schema prompt",
        "rows: 3",
        "train: 3 samples",
        "longest sample",
        "samples cut to 64 tokens: 1",
        "up to",
    ):
        assert fact in text


@given(st.integers(0, 2**24 - 1), st.integers(0, 2**40 - 1))
def test_places_fit_into_64_bits(file, line):
    assert pack_place((file, line)) < 2**64
    assert unpack_place(pack_place((file, line))) == (file, line)
