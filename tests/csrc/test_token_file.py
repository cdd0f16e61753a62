"""The format, byte by byte, and what the reader does with damaged and hostile files."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome import _C
from llamahome.errors import DataError

Shard = Callable[[bytes], Path]
SMALL = [([7, 300, 5, 9], [False, False, True, True], 11), ([1], [False], 12), ([2, 3, 4], [False, True, True], 13)]

# SMALL with 2-byte tokens, as docs/token-store.md prints it; runs of zeros are left out.
GOLDEN = {
    0x0000: "894c48544f4b0d0a 01000000 02000000",  # magic, version, token width
    0x0010: "0300000000000000 0800000000000000 0400000000000000 0200000000000000",  # documents, tokens, trained, runs
    0x0030: "4010000000000000 c010000000000000 0011000000000000 4011000000000000",  # sections
    0x0050: "4411000000000000 2c010000",  # file size, largest token id
    0x1000: "0700 2c01 0500 0900 0100 0200 0300 0400",
    0x1040: "0000000000000000 0000000000000000 0b00000000000000 02000000 00000000",
    0x1060: "0400000000000000 0100000000000000 0c00000000000000 00000000 00000000",
    0x1080: "0500000000000000 0100000000000000 0d00000000000000 02000000 00000000",
    0x10A0: "0800000000000000 0200000000000000 0000000000000000 00000000 00000000",
    0x10C0: "02000000 04000000 01000000 03000000",
    0x1100: "00000000",
}


def write(path: Path, documents: list, width: int = 2) -> bytes:
    writer = _C.TokenFileWriter(path, width)
    for ids, trained, source in documents:
        writer.append(
            np.array(ids, np.uint32), np.array(trained, bool), np.array([len(ids)]), np.array([source], np.uint64)
        )
    writer.finish()
    return path.read_bytes()


def read_all(path: Path, mapped: bool) -> list:
    """All that can be read, by each of the reader's methods."""
    reader = _C.BatchReader([path], mapped)
    ids = np.arange(reader.num_documents)
    lengths, trained, sources = (
        np.empty(len(ids), np.uint32),
        np.empty(len(ids), np.uint32),
        np.empty(len(ids), np.uint64),
    )
    reader.lengths(ids, lengths)
    reader.trained_counts(ids, trained)
    reader.sources(ids, sources)
    packed = np.empty((3, int(lengths.sum())), np.int64)
    bounds = np.empty(len(ids) + 1, np.int32)
    count = reader.pack(ids, *packed, bounds)
    rows = np.empty((2, -(-reader.num_tokens // 3), 3), np.int64)
    count_rows = reader.rows(np.arange(rows.shape[1]), *rows)
    return [x.tolist() for x in (lengths, trained, sources, packed, bounds, rows)] + [count, count_rows]


def test_golden_bytes(tmp_path: Path) -> None:
    content = write(tmp_path / "shard", SMALL)
    for offset, text in GOLDEN.items():
        expected = bytes.fromhex(text)
        assert content[offset : offset + len(expected)] == expected, hex(offset)
    assert content[0x5C:0x60].hex() == "21b7b877"  # checksum of the checksums
    assert content[0xFFC:0x1000].hex() == "ea1eca52"  # checksum of the header
    assert content[0x1140:].hex() == "2d5b939d"  # checksum of the only block


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_writer_writes_what_the_specification_says(tmp_path_factory, encode, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([2, 4]))
    ids = st.lists(st.integers(0, 256**width - 1), min_size=1, max_size=data.draw(st.sampled_from([5, 3000])))
    documents = []
    for tokens in data.draw(st.lists(ids, max_size=12)):
        marks = np.random.default_rng(len(tokens)).random(len(tokens)) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        documents.append((tokens, marks.tolist(), data.draw(st.integers(0, 2**64 - 1))))
    path = tmp_path_factory.mktemp("shard") / "shard"
    assert write(path, documents, width) == encode(documents, width)
    _C.BatchReader([path]).verify(0)


@pytest.mark.parametrize("portable", [False, True])
def test_crc32c_is_castagnoli(portable: bool) -> None:
    assert _C.crc32c(b"123456789", portable) == 0xE3069283
    assert _C.crc32c(bytes(32), portable) == 0x8A9136AA


def test_crc32c_is_the_same_with_and_without_the_instruction() -> None:
    data = np.random.default_rng(0).bytes(13000)
    for size in [*range(70), 4079, 4080, 4081, 4095, 4096, 4097, 8160, 8176, 12999]:
        assert _C.crc32c(data[:size]) == _C.crc32c(data[:size], True), size


def reads_right_or_raises(path: Path, mapped: bool, right: list) -> bool:
    """Whether all was read in spite of the damage; if not, the error must say where."""
    try:
        found = read_all(path, mapped)
    except DataError as error:
        if str(path) in error.where and "byte" in error.where:
            return False
        raise
    assert found == right
    return True


@pytest.mark.parametrize("step", [64, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mapped", [True, False])
def test_every_bit_flip_is_found(shard: Shard, encode, mapped: bool, step: int) -> None:
    """By what reads the byte, or at the latest by verify; nothing wrong is ever returned."""
    content = bytearray(encode(SMALL))
    path = shard(content)
    right = read_all(path, mapped)
    unread = 0
    # The header's zeros are all alike: one flip in every `step` bytes is enough there.
    bytes_to_flip = [*range(100), *range(100, 4092, step), *range(4092, len(content))]
    with path.open("r+b", buffering=0) as file:
        for at in bytes_to_flip:
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([content[at] ^ 1 << bit]), at)
                unread += reads_right_or_raises(path, mapped, right)
                with pytest.raises(DataError):
                    _C.BatchReader([path], mapped).verify(0)
            os.pwrite(file.fileno(), content[at : at + 1], at)
    assert unread == 0  # all of it is in one block, so no flip was outside what was read


def test_damage_outside_of_what_is_read_does_no_harm(shard: Shard, encode) -> None:
    documents = [(list(range(3000)), [True] * 3000, 0), ([5] * 3000, [True] * 3000, 1)]
    content = bytearray(encode(documents))
    content[4096 + 100] ^= 1
    reader = _C.BatchReader([shard(content)])
    out, bounds = np.empty((3, 3000), np.int64), np.empty(2, np.int32)
    reader.pack(np.array([1]), *out, bounds)
    assert (out[0] == 5).all()
    with pytest.raises(DataError, match="byte 4096"):
        reader.pack(np.array([0]), *out, bounds)


@pytest.mark.parametrize("mapped", [True, False])
def test_every_truncation_and_extension_is_refused(shard: Shard, encode, mapped: bool) -> None:
    content = encode(SMALL)
    path = shard(content)
    for size in range(len(content) - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(DataError):
            _C.BatchReader([path], mapped)
    for extra in (1, 4096):
        path.write_bytes(content + bytes(extra))
        with pytest.raises(DataError, match="its header says"):
            _C.BatchReader([path], mapped)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_truncated_while_open_is_an_error(shard: Shard, encode, mapped: bool) -> None:
    documents = [(list(range(4000)), [True] * 4000, i) for i in range(40)]
    path = shard(encode(documents))
    reader = _C.BatchReader([path], mapped)
    os.truncate(path, 4096 + 8000)
    out, bounds = np.empty((3, 4000), np.int64), np.empty(2, np.int32)
    with pytest.raises(DataError, match="truncated"):
        reader.pack(np.array([30]), *out, bounds)
    with pytest.raises(DataError, match="truncated"):
        reader.rows(np.array([70]), out[:1, :2000].copy(), out[:1, :2000].copy())
    with pytest.raises(DataError, match="truncated"):
        reader.lengths(np.array([3]), np.empty(1, np.uint32))
    with pytest.raises(DataError, match="truncated"):
        reader.verify(0)


def hostile_shards(encode) -> dict[str, bytes]:
    """Files whose checksums are all right and whose content lies."""

    def records(*rows: tuple[int, int, int]) -> list[list[int]]:
        return [[token, run, 0, trained, 0] for token, run, trained in rows]

    def u64(value: int) -> bytes:
        return struct.pack("<Q", value)

    good = [(0, 0, 2), (4, 1, 0), (5, 1, 2), (8, 2, 0)]
    shards = {
        "tokens descend": encode(SMALL, records=records((4, 0, 2), (0, 1, 0), *good[2:])),
        "tokens beyond the end": encode(SMALL, records=records(*good[:2], (2**63, 1, 2), (8, 2, 0))),
        "first token is not the first": encode(SMALL, records=records((1, 0, 2), *good[1:])),
        "runs descend": encode(SMALL, records=records(good[0], (4, 2, 0), *good[2:])),
        "runs beyond the end": encode(SMALL, records=records((0, 0, 2), (4, 1, 0), (5, 2**60, 2), (8, 2, 0))),
        "more trained than tokens": encode(SMALL, records=records((0, 0, 5), *good[1:])),
        "empty document": encode(SMALL, records=records(good[0], (5, 1, 0), *good[2:])),
        "run beyond the document": encode(SMALL, runs=[(2, 40), (1, 3)]),
        "run backwards": encode(SMALL, runs=[(4, 2), (1, 3)]),
        "run at the first token": encode(SMALL, runs=[(0, 2), (1, 3)]),
        "runs that do not add up": encode(SMALL, runs=[(3, 4), (1, 3)]),
        "start beyond the documents": encode(SMALL, starts=[3]),
        "start that is no index": encode(SMALL, starts=[2**32 - 1]),
        "start too late": encode(SMALL, starts=[2]),
        "wrong largest token": encode(SMALL, header={0x58: struct.pack("<I", 299)}),
        "wrong trained total": encode(SMALL, header={0x20: u64(3)}),
        "newer version": encode(SMALL, header={8: b"\2"}),
        "width 3": encode(SMALL, header={12: b"\3"}),
        "width 4 of 2": encode(SMALL, header={12: b"\4"}),
    }
    for name, at in {"documents": 0x10, "tokens": 0x18, "trained": 0x20, "runs": 0x28}.items():
        for value in (0, 1, 100, 2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1):
            shards[f"{value} {name}"] = encode(SMALL, header={at: u64(value)})
    for at in range(0x30, 0x58, 8):
        for value in (0, 4096, 4097, 2**62, 2**64 - 64):
            shards[f"{value} at {at}"] = encode(SMALL, header={at: u64(value)})
    return shards


def is_refused(path: Path, mapped: bool) -> bool:
    try:
        _C.BatchReader([path], mapped).verify(0)
    except DataError:
        return True
    return False


@pytest.mark.parametrize("mapped", [True, False])
def test_hostile_files_are_refused(shard: Shard, encode, mapped: bool) -> None:
    for name, content in hostile_shards(encode).items():
        path = shard(content)
        assert is_refused(path, mapped), name
        with suppress(DataError, IndexError):
            read_all(path, mapped)  # wrong or an error, but no crash


def test_what_is_not_a_file_is_refused(tmp_path: Path, encode) -> None:
    with pytest.raises(DataError, match="not a regular file"):
        _C.BatchReader([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        _C.BatchReader([tmp_path / "pipe"])
    (tmp_path / "real").write_bytes(encode(SMALL))
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="symbolic links") as caught:
        _C.BatchReader([tmp_path / "link"])
    assert caught.value.filename == str(tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        _C.BatchReader([tmp_path / "none"])
    (tmp_path / "text").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match="not a token file"):
        _C.BatchReader([tmp_path / "text"])
