"""Micro-batches: how a step is cut, and the tensors of one cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from llamahome import _C
from llamahome.data.store import TokenStore


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Whole samples, end to end in one flat row of T tokens; a rounded row is filled up at its end.

    labels follow Hugging Face's convention: not shifted, -100 where a token is not trained and at each sample's start.
    The filling has id 0, position 0 and label -100, and belongs to no sample of `cu_seqlens`.
    """

    input_ids: torch.Tensor  # int64 [1, T]
    labels: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T], from 0 in each sample
    cu_seqlens: torch.Tensor  # int32 [n + 1], bounds of the samples in the row
    lengths: tuple[int, ...]  # tokens per sample
    sample_ids: tuple[int, ...]
    num_tokens: int
    num_trained: int

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on `device`; the copy from pinned memory does not wait."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
        )


class BatchProcessor:
    """Cuts the samples of a step into micro-batches and reads them from the store.

    A cut is a memory decision: it never changes which samples a step has.
    """

    def __init__(self, store: TokenStore, pin_memory: bool = False, round_rows: bool = False) -> None:
        """`round_rows` fills rows up to a few fixed sizes, for libraries that keep something for every new shape."""
        self.store = store
        self.pin_memory = pin_memory
        self.round_rows = round_rows

    def cut(
        self,
        sample_ids: Sequence[int] | NDArray[np.int64],
        *,
        token_budget: int | None = None,
        max_samples: int | None = None,
    ) -> list[NDArray[np.int64]]:
        """Groups of sample ids, each sample in exactly one; one group where nothing limits them.

        max_samples: consecutive groups in the step's order. token_budget: best fit of whole samples, longest first,
        within each of those groups; a sample longer than the budget gets a group of its own. Deterministic.
        Raises: ValueError for a limit below 1.
        """
        ids = np.ascontiguousarray(sample_ids, np.int64)
        size = max_samples if max_samples is not None else max(1, len(ids))
        if size < 1:
            raise ValueError(f"max_samples {size} is below 1")
        groups = [ids[begin : begin + size] for begin in range(0, len(ids), size)]
        if token_budget is None:
            return groups
        return [part for group in groups for part in self._pack(group, token_budget)]

    def _pack(self, ids: NDArray[np.int64], token_budget: int) -> list[NDArray[np.int64]]:
        order, bounds = _C.plan_packing(self.store.lengths(ids), token_budget)
        return np.split(ids[order], bounds[1:-1])

    def build(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
        """Read samples into fresh tensors, pinned if asked for. Raises: DataError when the store is damaged."""
        ids = np.ascontiguousarray(sample_ids, np.int64)
        lengths = tuple(self.store.lengths(ids).tolist())
        tokens = sum(lengths)
        size = row_size(tokens) if self.round_rows else tokens
        row = torch.empty((3, 1, size), dtype=torch.int64, pin_memory=self.pin_memory)
        cu_seqlens = torch.empty(len(ids) + 1, dtype=torch.int32, pin_memory=self.pin_memory)
        flat = row.numpy()[:, 0]
        input_ids, labels, position_ids = flat[:, :tokens]
        trained = self.store.pack(ids, input_ids, labels, position_ids, cu_seqlens.numpy())
        flat[:, tokens:] = [[0], [-100], [0]]
        return MicroBatch(
            input_ids=row[0],
            labels=row[1],
            position_ids=row[2],
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            sample_ids=tuple(ids.tolist()),
            num_tokens=tokens,
            num_trained=trained,
        )


def row_size(tokens: int) -> int:
    """The next of 32 sizes between a power of two and its double: at most 3 % more above 256 tokens."""
    step = max(8, (1 << max(0, tokens - 1).bit_length()) // 64)
    return -(-tokens // step) * step
