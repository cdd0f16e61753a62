"""Texts to tokens and trained marks, a batch at a time.

A token is trained when its first character lies in a trained span of the text. A token that crosses the beginning of
a span is therefore not trained, and one that crosses its end is.

Where tokens begin follows from their widths, the bytes of text that each of them stands for: that spares the library
its offsets, a fifth of its time. A width is never too large, so the tokens of a text have been placed exactly when
their widths add up to its bytes. Texts where they do not (an added token took spaces in), and tokenizers whose widths
are not known, take the library's offsets.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Span = tuple[int, int]
Marks = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
Widths = npt.NDArray[np.uint16]

_SPACE = "\u2581"  # SentencePiece's
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPLITTERS = {"Digits", "Punctuation", "Split"}  # they may leave characters out, but add none


class Encoded(NamedTuple):
    """The tokens of one sample (uint32) and which of them are trained (bool); the first never is."""

    ids: npt.NDArray[np.uint32]
    trained: Marks


class Rendered(NamedTuple):
    """A sample as text; `spans` are its trained characters. `closed` texts get the tokenizer's bos and an eos."""

    text: str
    spans: Sequence[Span]
    closed: bool = False


class Encoder:
    """Tokenises rendered samples; may be called by several threads at once."""

    def __init__(
        self, backend: Any, spec: Mapping[str, Any], bos: Sequence[int], eos: Sequence[int], *, train_all: bool
    ) -> None:
        """`backend` is a `tokenizers.Tokenizer` without truncation, padding and post-processor, `spec` its JSON."""
        self._backend, self._train_all = backend, train_all
        self._bos, self._eos = np.array(bos, np.uint32), np.array(eos, np.uint32)
        self._widths = token_widths(spec)
        self._composes = any(part["type"] == "NFC" for part in _parts(spec, "normalizer"))

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokens with trained marks."""
        texts = [item.text for item in rendered]
        call = self._backend.encode_batch if self._widths is None else self._backend.encode_batch_fast
        encodings = call(texts, add_special_tokens=False)
        lists: list[list[int]] = [encoding.ids for encoding in encodings]
        bounds = _bounds([len(part) for part in lists])
        joined = array("I")  # by far the fastest way from lists to numbers
        for part in lists:
            joined.fromlist(part)
        ids = np.frombuffer(joined, np.uint32)
        if self._train_all:
            trained = np.ones(len(ids), np.bool_)
        elif self._widths is None:
            trained = np.concatenate([np.empty(0, np.bool_), *map(_marks, encodings, rendered)])
        else:
            trained = self._marks_by_width(rendered, self._widths[ids], bounds)
        return list(self._cut(rendered, ids, trained, bounds.tolist()))

    def _marks_by_width(self, rendered: Sequence[Rendered], widths: Widths, bounds: Numbers) -> Marks:
        """Marks of the tokens of all texts; those of text i are bounds[i] to bounds[i + 1]."""
        origins, ends = _bounds([_bytes(item.text) for item in rendered]), _bounds(widths)
        starts = ends[:-1]
        placed = np.diff(ends[bounds]) == np.diff(origins)
        if self._composes:
            placed &= np.array([unicodedata.is_normalized("NFC", item.text) for item in rendered], np.bool_)
        off = np.flatnonzero(~placed)
        if len(off):  # tokens of these are put at the beginning of their text
            starts = starts + np.repeat(origins[:-1] - ends[bounds[:-1]], np.diff(bounds))
            for i in off.tolist():
                starts[bounds[i] : bounds[i + 1]] = origins[i]
        spans = [
            (origin + _bytes(item.text, begin), origin + _bytes(item.text, end))
            for item, origin in zip(rendered, origins.tolist(), strict=False)
            for begin, end in item.spans
        ]
        marks = np.zeros(len(widths), np.bool_)
        for first, last in np.searchsorted(starts, np.array(spans, np.int64).reshape(-1, 2)).tolist():
            marks[first:last] = True
        for i in off.tolist():
            [encoding] = self._backend.encode_batch([rendered[i].text], add_special_tokens=False)
            marks[bounds[i] : bounds[i + 1]] = _marks(encoding, rendered[i])
        return marks

    def _cut(
        self, rendered: Sequence[Rendered], ids: npt.NDArray[np.uint32], trained: Marks, bounds: Sequence[int]
    ) -> Iterator[Encoded]:
        """The samples one by one, with what closes them."""
        for i, item in enumerate(rendered):
            part, marks = ids[bounds[i] : bounds[i + 1]], trained[bounds[i] : bounds[i + 1]]
            if item.closed:
                part = np.concatenate([self._bos, part, self._eos])
                before = np.full(len(self._bos), self._train_all)
                marks = np.concatenate([before, marks, np.ones(len(self._eos), np.bool_)])
            marks[:1] = False  # nothing predicts it
            yield Encoded(part, marks)


def token_widths(spec: Mapping[str, Any]) -> Widths | None:
    """Bytes of text that each token of a `tokenizer.json` stands for, at the least; None where that is not known.

    Known for BPE over bytes (GPT-2, Llama 3, Qwen, SmolLM2) and over characters with a fall-back to bytes (Gemma).
    """
    model = spec["model"]
    affixed = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or model.get("dropout") or affixed:
        return None
    normalizers = _parts(spec, "normalizer")
    others = [part for part in _parts(spec, "pre_tokenizer") if part["type"] not in _SPLITTERS]
    if others:
        by_byte = all(part["type"] == "ByteLevel" and not part["add_prefix_space"] for part in others)
        kept = all(part["type"] == "NFC" for part in normalizers)
        return _table(spec, by_byte=True) if by_byte and kept else None
    return _table(spec, by_byte=False) if model.get("byte_fallback") and normalizers == [_REPLACE] else None


def _table(spec: Mapping[str, Any], *, by_byte: bool) -> Widths:
    vocab: dict[str, int] = spec["model"]["vocab"]
    added: dict[int, str] = {token["id"]: token["content"] for token in spec["added_tokens"]}
    widths = np.zeros(max(chain(vocab.values(), added), default=-1) + 1, np.int64)
    for token, number in vocab.items():
        widths[number] = len(token) if by_byte else _width(token)
    for number, token in added.items():
        # The same id may come out of the model, too: what is smaller holds for both.
        widths[number] = min(_width(token), int(widths[number]) or _width(token))
    unknown = spec["model"].get("unk_token")
    if unknown in vocab:
        widths[vocab[unknown]] = 0  # stands for anything
    return widths.clip(max=np.iinfo(np.uint16).max).astype(np.uint16)


def _width(token: str) -> int:
    return 1 if _BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode())


def _parts(spec: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The normalizers or pre-tokenizers in the order in which they run."""
    part = spec[name]
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part["normalizers" if name == "normalizer" else "pretokenizers"]
    return [found for one in inner for found in _parts({name: one}, name)]


def _bounds(sizes: Sequence[int] | Widths) -> Numbers:
    """0 and the running sums."""
    bounds = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=bounds[1:])
    return bounds


def _bytes(text: str, end: int | None = None) -> int:
    """Bytes of the first `end` characters."""
    if text.isascii():
        return len(text) if end is None else min(end, len(text))
    return len(text[:end].encode())


def _marks(encoding: Any, item: Rendered) -> Marks:
    """Marks from the library's offsets."""
    marks = np.zeros(len(encoding), np.bool_)
    for start, end in item.spans:
        marks[_first_token(encoding, start, item.text) : _first_token(encoding, end, item.text)] = True
    return marks


def _first_token(encoding: Any, position: int, text: str) -> int:
    """The index of the first token that begins at the character `position` or later."""
    # Characters that a normaliser dropped belong to no token.
    while position < len(text) and (token := encoding.char_to_token(position)) is None:
        position += 1
    if position >= len(text):
        return len(encoding)
    while token < len(encoding) and encoding.token_to_chars(token)[0] < position:
        token += 1
    return int(token)
