"""Marks found from the widths of tokens equal those from the library's offsets, whatever the text."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from llamahome.data.encoding import Encoder, Rendered, token_widths

WORDS = ["the quick brown fox jumps over the lazy dog", "  two  plus 2 is 4\n\n", "Ünïcödé 日本 😀 e\u0301", "▁ <0x41>"]
TEXT = st.lists(
    st.sampled_from(
        [*WORDS, "<|end|>", " <|end|>  ", "<pad>", "é", "e\u0301", "\u0300", "😀", "日", "▁", "<0x41>", " "]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=12,
).map("".join)


@cache
def train(kind: str) -> Tokenizer:
    """A small tokenizer as real models have them."""
    bytewise = kind != "gemma"
    tokenizer = Tokenizer(models.BPE(byte_fallback=not bytewise, unk_token=None if bytewise else "<unk>"))
    special = ["<unk>", "<pad>"]
    if bytewise:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        tokenizer.normalizer = normalizers.NFC() if kind == "qwen" else None
    else:
        alphabet = []
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS[:2] * 9, trainer)
    if not bytewise:
        tokenizer = _only_added(tokenizer, ["<unk>", "<pad>"])
    swallows = kind == "swallows"
    tokenizer.add_special_tokens([AddedToken("<|end|>", lstrip=swallows, rstrip=swallows)])
    return tokenizer


def _only_added(tokenizer: Tokenizer, names: list[str]) -> Tokenizer:
    """Bytes are tokens of the model, not added ones."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in names]
    return Tokenizer.from_str(json.dumps(spec))


def encoder_of(tokenizer: Tokenizer, bos: list[int], eos: list[int], *, train_all: bool) -> Encoder:
    return Encoder(tokenizer, json.loads(tokenizer.to_str()), bos, eos, train_all=train_all)


KNOWN = ("gpt2", "qwen", "gemma", "swallows")


def spans_of(text: str, cuts: list[int]) -> list[tuple[int, int]]:
    """Spans that do not overlap, within the text."""
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return list(zip(places[::2], places[1::2], strict=False))


def by_offsets(tokenizer: Tokenizer, item: Rendered) -> tuple[list[int], list[bool]]:
    """A token is trained if its first character is, by the library's own offsets."""
    encoding = tokenizer.encode(item.text, add_special_tokens=False)
    marks = [any(begin <= start < end for begin, end in item.spans) for start, _ in encoding.offsets]
    return encoding.ids, [False, *marks[1:]] if marks else []


@pytest.mark.parametrize("kind", KNOWN)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.tuples(TEXT, st.lists(st.integers(0, 10**6), max_size=6)), max_size=6))
def test_widths_and_offsets_agree(kind: str, texts: list) -> None:
    tokenizer = train(kind)
    assert token_widths(json.loads(tokenizer.to_str())) is not None
    items = [Rendered(text, spans_of(text, cuts)) for text, cuts in texts]
    found = encoder_of(tokenizer, [], [], train_all=False).encode(items)
    assert [(ids.tolist(), trained.tolist()) for ids, trained in found] == [by_offsets(tokenizer, x) for x in items]


def test_most_texts_need_no_offsets() -> None:
    """Else the test above would prove nothing about widths."""
    for kind in ("gpt2", "qwen", "gemma"):
        encoder = encoder_of(train(kind), [], [], train_all=False)
        encoder._backend = FastOnly(train(kind))
        texts = [*WORDS[:2], "Ünïcödé 日本 😀"]
        encoder.encode([Rendered(f"{text}<|end|>{text}", [(3, 9)]) for text in texts])


class FastOnly:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode_batch_fast = tokenizer.encode_batch_fast


def test_tokenizers_that_add_characters_have_no_widths() -> None:
    assert token_widths(json.loads(train("prefix").to_str())) is None
    spec = json.loads(train("gpt2").to_str())
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}},
        {"model": spec["model"] | {"type": "WordPiece"}},
        {"model": spec["model"] | {"dropout": 0.1}},
        {"model": spec["model"] | {"end_of_word_suffix": "</w>"}},
    ):
        assert token_widths(spec | change) is None, change


def test_no_width_exceeds_the_text_of_a_token() -> None:
    for kind in KNOWN:
        widths = token_widths(json.loads(train(kind).to_str()))
        for text in [*WORDS, "<|end|>", " <|end|> ", "\u0300"]:
            encoding = train(kind).encode(text, add_special_tokens=False)
            assert widths[encoding.ids].sum() <= len(text.encode()), (kind, text)


def test_closed_texts_are_framed() -> None:
    encoder = encoder_of(train("gpt2"), [1], [0], train_all=False)
    [alone, empty] = encoder.encode([Rendered("the fox", [(0, 7)], closed=True), Rendered("", [], closed=True)])
    inner = train("gpt2").encode("the fox").ids
    assert alone.ids.tolist() == [1, *inner, 0]
    assert alone.trained.tolist() == [False] + [True] * (len(inner) + 1)
    assert (empty.ids.tolist(), empty.trained.tolist()) == ([1, 0], [False, True])
    [everything] = encoder_of(train("gpt2"), [1, 1], [], train_all=True).encode([Rendered("the", [], closed=True)])
    assert everything.trained.tolist() == [False] + [True] * (len(everything.ids) - 1)
    assert everything.ids.dtype == np.uint32
