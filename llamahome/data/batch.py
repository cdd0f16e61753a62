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
    """Whole samples, end to end in one flat row of T tokens. No padding.

    labels follow Hugging Face's convention: not shifted, -100 where a token is not trained and at each sample's start.
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

    def __init__(self, store: TokenStore, pin_memory: bool = False) -> None:
        self.store = store
        self.pin_memory = pin_memory

    def cut(
        self,
        sample_ids: Sequence[int] | NDArray[np.int64],
        *,
        token_budget: int | None = None,
        max_samples: int | None = None,
    ) -> list[NDArray[np.int64]]:
        """Groups of sample ids, each sample in exactly one: one group, unless limited by one of the two.

        token_budget: best fit of whole samples, longest first; a sample longer than the budget gets a group of its own.
        max_samples: consecutive groups in the step's order. Deterministic. Raises: ValueError.
        """
        if token_budget is not None and max_samples is not None:
            raise ValueError("limit a cut by token_budget or by max_samples, not by both")
        ids = np.ascontiguousarray(sample_ids, np.int64)
        if not ids.size:
            return []
        if token_budget is not None:
            order, bounds = _C.plan_packing(self.store.lengths(ids), token_budget)
            return np.split(ids[order], bounds[1:-1])
        size = max_samples if max_samples is not None else len(ids)
        if size < 1:
            raise ValueError(f"max_samples {size} is below 1")
        return [ids[begin : begin + size] for begin in range(0, len(ids), size)]

    def build(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
        """Read samples into fresh tensors, pinned if asked for. Raises: DataError when the store is damaged."""
        ids = np.ascontiguousarray(sample_ids, np.int64)
        lengths = tuple(self.store.lengths(ids).tolist())
        row = torch.empty((3, 1, sum(lengths)), dtype=torch.int64, pin_memory=self.pin_memory)
        cu_seqlens = torch.empty(len(ids) + 1, dtype=torch.int32, pin_memory=self.pin_memory)
        flat = row.numpy()[:, 0]
        trained = self.store.pack(ids, flat[0], flat[1], flat[2], cu_seqlens.numpy())
        return MicroBatch(
            input_ids=row[0],
            labels=row[1],
            position_ids=row[2],
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            sample_ids=tuple(ids.tolist()),
            num_tokens=sum(lengths),
            num_trained=trained,
        )
