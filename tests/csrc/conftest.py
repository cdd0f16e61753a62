"""A second writer of token files, in plain Python from docs/token-store.md, that can also write wrong ones."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

PAGE = 4096
Document = tuple[Sequence[int], Sequence[bool], int]
Encode = Callable[..., bytes]


def crc32c(data: bytes) -> int:
    """Bit by bit, as the definition says."""
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def runs_of(trained: Sequence[bool]) -> list[tuple[int, int]]:
    marks = [False, *trained[1:], False]
    edges = [i for i in range(1, len(marks)) if marks[i] != marks[i - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def encode_shard(
    documents: Sequence[Document],
    width: int = 2,
    *,
    records: list[list[int]] | None = None,
    runs: list[tuple[int, int]] | None = None,
    starts: list[int] | None = None,
    header: dict[int, bytes] | None = None,
) -> bytes:
    """The bytes of a shard. `records`, `runs`, `starts` and `header` (offset: bytes) replace what belongs there; the
    checksums are right all the same."""
    tokens = [token for ids, _, _ in documents for token in ids]
    own_runs, own_records, position = [], [], 0
    for ids, trained, source in documents:
        found = runs_of(trained)
        own_records.append([position, len(own_runs), source, sum(end - begin for begin, end in found), 0])
        own_runs += found
        position += len(ids)
    own_records.append([position, len(own_runs), 0, 0, 0])
    step = PAGE // width
    begins = [record[0] for record in own_records]
    own_starts = [max(i for i, begin in enumerate(begins) if begin <= at) for at in range(0, position, step)]
    trained_total = sum(record[3] for record in own_records)
    runs = own_runs if runs is None else runs
    body = bytearray()
    offsets = []
    for section in (
        struct.pack(f"<{len(tokens)}{'H' if width == 2 else 'I'}", *tokens),
        b"".join(struct.pack("<QQQII", *record) for record in (records or own_records)),
        b"".join(struct.pack("<II", *run) for run in runs),
        struct.pack(f"<{len(starts or own_starts)}I", *(starts or own_starts)),
    ):
        offsets.append(PAGE + len(body))
        body += section + bytes(-len(section) % 64)
    checksums = b"".join(struct.pack("<I", crc32c(body[at : at + PAGE])) for at in range(0, len(body), PAGE))
    top = struct.pack(
        "<8sII9QII",
        b"\x89LHTOK\r\n",
        1,
        width,
        len(documents),
        len(tokens),
        trained_total,
        len(runs),
        *offsets[1:],
        PAGE + len(body),
        PAGE + len(body) + len(checksums),
        max(tokens, default=0),
        crc32c(checksums),
    )
    page = bytearray(top.ljust(PAGE - 4, b"\0"))
    for at, value in (header or {}).items():
        page[at : at + len(value)] = value
    return bytes(page) + struct.pack("<I", crc32c(page)) + bytes(body) + checksums


@pytest.fixture(scope="session")
def encode() -> Encode:
    return encode_shard


@pytest.fixture
def shard(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "shard-00000.tokens"
        path.write_bytes(content)
        return path

    return write
