"""Content hashes of samples on disk, to count what is there twice in bounded memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llamahome.data.schemas import Sample

PASS_HASHES = 1 << 23  # different hashes that one pass holds: 64 MiB, and as much again while they are merged
_BLOCK = 1 << 20
Hashes = npt.NDArray[np.uint64]


def hash_sample(sample: Sample) -> int:
    """64 bits of a sample's content, evenly spread."""
    return int.from_bytes(blake2b(sample.canonical(), digest_size=8).digest(), "little")


class HashWriter:
    """Writes the hash of each sample to a file, 8 bytes each."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._waiting = array("Q")
        self._last: tuple[Sample | None, int] = (None, 0)

    def add(self, sample: Sample) -> int:
        """The hash of a sample; the pieces of one sample are written once."""
        if sample is not self._last[0]:
            self._last = sample, hash_sample(sample)
            self._waiting.append(self._last[1])
            if len(self._waiting) == _BLOCK:
                self.flush()
        return self._last[1]

    def flush(self) -> None:
        self._waiting.tofile(self._file)
        self._file.flush()
        del self._waiting[:]


def count_repeated(files: Sequence[Path]) -> int:
    """Samples that are equal to an earlier one."""
    passes = _passes(files)
    return _total(files) - sum(len(_distinct(files, number, passes)) for number in range(passes))


def count_shared(files: Sequence[Path], known: Sequence[Path]) -> int:
    """Samples of `files` that `known` has, too."""
    if not _total(files):
        return 0
    passes = _passes(known)
    shared = 0
    for number in range(passes):
        seen = _distinct(known, number, passes)
        if len(seen):
            for block in _blocks(files, number, passes):
                shared += int((seen[np.searchsorted(seen, block) % len(seen)] == block).sum())
    return shared


def _total(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files) // 8


def _passes(files: Sequence[Path]) -> int:
    return -(-_total(files) // PASS_HASHES) or 1


def _distinct(files: Sequence[Path], number: int, passes: int) -> Hashes:
    """The different hashes of one pass, in order."""
    known = np.empty(0, np.uint64)
    waiting: list[Hashes] = []
    count = 0
    for block in _blocks(files, number, passes):
        waiting.append(np.unique(block))
        count += len(waiting[-1])
        if count >= max(_BLOCK, len(known)):  # doubling keeps the merges few
            known, waiting, count = np.unique(np.concatenate([known, *waiting])), [], 0
    return np.unique(np.concatenate([known, *waiting]))


def _blocks(files: Sequence[Path], number: int, passes: int) -> Iterator[Hashes]:
    """The hashes that belong to one pass."""
    for path in files:
        with path.open("rb") as file:
            while len(block := np.fromfile(file, np.uint64, _BLOCK)):
                yield block if passes == 1 else block[block % np.uint64(passes) == number]
