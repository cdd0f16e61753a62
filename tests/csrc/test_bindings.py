"""Wrong arguments are exceptions: never a crash, never a silent conversion."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from llamahome import _C

STUB = Path(__file__).parents[2] / "llamahome" / "_C.pyi"


@pytest.fixture
def reader(tmp_path: Path, encode) -> _C.BatchReader:
    path = tmp_path / "shard"
    path.write_bytes(encode([([1, 2, 3], [False, True, True], 0), ([4, 5], [False, False], 1)]))
    return _C.BatchReader([path])


def buffers(size: int) -> list:
    return [*np.empty((3, size), np.int64), np.empty(3, np.int32)]


IDS = np.array([0, 1])


def test_buffers_of_wrong_size_are_refused(reader: _C.BatchReader) -> None:
    assert reader.pack(IDS, *buffers(5)) == 2
    for size in (0, 4, 6):
        with pytest.raises(ValueError, match="5 tokens"):
            reader.pack(IDS, *buffers(size))
    good = buffers(5)
    for i, short in enumerate([np.empty(4, np.int64)] * 3 + [np.empty(2, np.int32)]):
        with pytest.raises(ValueError):
            reader.pack(IDS, *good[:i], short, *good[i + 1 :])
    with pytest.raises(ValueError):
        reader.lengths(IDS, np.empty(3, np.uint32))
    for shape in ((1, 2), (3, 2), (2, 0)):
        with pytest.raises(ValueError):
            reader.rows(IDS, np.empty(shape, np.int64), np.empty(shape, np.int64))
    with pytest.raises(ValueError):
        reader.rows(IDS, np.empty((2, 2), np.int64), np.empty((2, 3), np.int64))
    with pytest.raises(ValueError):
        reader.rows(np.empty(0, np.int64), np.empty((0, 0), np.int64), np.empty((0, 0), np.int64))


@pytest.mark.parametrize("number", [-1, 2, 2**62, -(2**63)])
def test_documents_and_rows_that_do_not_exist(reader: _C.BatchReader, number: int) -> None:
    ids = np.array([0, number])
    for call in (
        lambda: reader.pack(ids, *buffers(5)),
        lambda: reader.lengths(ids, np.empty(2, np.uint32)),
        lambda: reader.trained_counts(ids, np.empty(2, np.uint32)),
        lambda: reader.sources(ids, np.empty(2, np.uint64)),
        lambda: reader.prefetch(ids),
        lambda: reader.verify(1),
        lambda: reader.prefetch_rows(ids, 4),
        lambda: reader.rows(ids, np.empty((2, 4), np.int64), np.empty((2, 4), np.int64)),
    ):
        with pytest.raises(IndexError):
            call()


def test_arrays_are_never_converted(reader: _C.BatchReader) -> None:
    wrong = [
        IDS.astype(np.int32),
        IDS.astype(np.float64),
        np.arange(4)[::2],  # not contiguous
        IDS.reshape(1, 2),
        IDS.astype(">i8"),
        [0, 1],
        None,
    ]
    for ids in wrong:
        with pytest.raises(TypeError):
            reader.pack(ids, *buffers(5))
    read_only = np.empty(5, np.int64)
    read_only.flags.writeable = False
    for bad in (np.empty(5, np.int32), np.empty(5, np.uint64), np.empty(10, np.int64)[::2], read_only):
        for i in range(3):
            good = buffers(5)
            good[i] = bad
            with pytest.raises(TypeError):
                reader.pack(IDS, *good)


def test_tensors_are_buffers_too(reader: _C.BatchReader) -> None:
    ids, labels, positions = torch.empty(3, 5, dtype=torch.int64)
    bounds = torch.empty(3, dtype=torch.int32)
    reader.pack(torch.tensor([1, 0]), ids, labels, positions, bounds)
    assert ids.tolist() == [4, 5, 1, 2, 3]
    assert labels.tolist() == [-100, -100, -100, 2, 3]
    assert positions.tolist() == [0, 1, 0, 1, 2]
    assert bounds.tolist() == [0, 2, 5]


def test_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    writer = _C.TokenFileWriter(tmp_path / "shard", 2)
    ids, marks, one = np.array([1, 2], np.uint32), np.zeros(2, bool), np.zeros(1, np.uint64)
    for lengths in ([1], [3], [0], [-1], [2**62]):
        with pytest.raises(ValueError):
            writer.append(ids, marks, np.array(lengths), one)
    with pytest.raises(ValueError):
        writer.append(ids, marks[:1], np.array([2]), one)
    with pytest.raises(ValueError, match="4 bytes"):
        writer.append(np.array([1, 65536], np.uint32), marks, np.array([2]), one)
    with pytest.raises(TypeError):
        writer.append(ids.astype(np.int64), marks, np.array([2]), one)
    writer.finish()
    with pytest.raises(RuntimeError):
        writer.finish()
    with pytest.raises(RuntimeError):
        writer.append(ids, marks, np.array([2]), one)
    with pytest.raises(FileExistsError):
        _C.TokenFileWriter(tmp_path / "shard", 2)
    with pytest.raises(ValueError):
        _C.TokenFileWriter(tmp_path / "other", 3)


def test_order_and_packing_refuse_nonsense() -> None:
    with pytest.raises(IndexError):
        _C.SampleOrder(5, 0, 0).fill(3, np.empty(3, np.int64))
    with pytest.raises(IndexError):
        _C.SampleOrder(5, 0, 0).fill(6, np.empty(0, np.int64))
    with pytest.raises(ValueError):
        _C.SampleOrder(2**63, 0, 0)
    with pytest.raises(TypeError):
        _C.SampleOrder(-1, 0, 0)
    with pytest.raises(ValueError):
        _C.plan_packing(np.array([1], np.uint32), 0)
    with pytest.raises(TypeError):
        _C.plan_packing(np.array([1], np.int64), 8)


def test_many_threads_read_the_same(reader: _C.BatchReader) -> None:
    results: list = []

    def read() -> None:
        for _ in range(200):
            out = buffers(5)
            reader.pack(IDS, *out)
            results.append(out[0].tolist())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1, 2, 3, 4, 5]] * 800


def test_the_stub_is_up_to_date(tmp_path: Path) -> None:
    made = tmp_path / "made.pyi"
    subprocess.run(
        [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "llamahome._C", "-o", str(made)], check=True, timeout=60
    )
    assert made.read_text() == STUB.read_text(), "run: python -m nanobind.stubgen -m llamahome._C -o llamahome/_C.pyi"
