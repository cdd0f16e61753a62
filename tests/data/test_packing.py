"""Cuts: every sample once, whole, within the budget."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome import _C
from llamahome.data.batch import BatchProcessor, row_size
from llamahome.data.store import TokenStore, TokenStoreWriter

LENGTHS = st.lists(st.integers(1, 60), max_size=200)


def plan(lengths: list[int], budget: int) -> list[list[int]]:
    order, bounds = _C.plan_packing(np.array(lengths, np.uint32), budget)
    return [order[begin:end].tolist() for begin, end in pairwise(bounds.tolist())]


@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 100))
def test_every_sample_is_in_one_row_and_rows_keep_the_budget(lengths: list[int], budget: int) -> None:
    rows = plan(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert row
        assert sum(lengths[i] for i in row) <= budget or len(row) == 1
    assert rows == plan(lengths, budget)


@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 100))
def test_the_plan_is_best_fit_decreasing(lengths: list[int], budget: int) -> None:
    """As many rows as the plain algorithm, and each as full."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(space, i) for i, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting)[1]] -= length
        else:
            free.append(max(budget, length) - length)
    rows = plan(lengths, budget)
    assert sorted(max(budget, sum(lengths[i] for i in row)) - sum(lengths[i] for i in row) for row in rows) == sorted(
        free
    )


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 2**32 - 1), max_size=50), budget=st.integers(1, 2**63))
def test_huge_lengths_and_budgets_keep_the_budget(lengths: list[int], budget: int) -> None:
    rows = plan(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= budget or len(row) == 1 for row in rows)


def test_large_plans_are_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.75, 1, 100_000), 8, 4096).astype(np.uint32)
    rows = len(_C.plan_packing(lengths, 8192)[1]) - 1
    assert lengths.sum() / (rows * 8192) > 0.999


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    with TokenStoreWriter(tmp_path / "store", 1000) as writer:
        for i, length in enumerate([5, 3, 8, 2, 12, 1]):
            writer.append(np.arange(length) + 100 * i, np.arange(length) % 3 > 0, i)
        return writer.commit()


def test_a_cut_by_budget_keeps_samples_whole(store: TokenStore) -> None:
    groups = BatchProcessor(store).cut([5, 4, 3, 2, 1, 0], token_budget=10)
    assert sorted(np.concatenate(groups).tolist()) == [0, 1, 2, 3, 4, 5]
    assert sorted(store.lengths(group).sum() for group in groups) == [9, 10, 12]
    assert all(group.dtype == np.int64 for group in groups)


def test_a_cut_by_samples_keeps_the_order(store: TokenStore) -> None:
    processor = BatchProcessor(store)
    assert [group.tolist() for group in processor.cut([5, 1, 3, 0, 2], max_samples=2)] == [[5, 1], [3, 0], [2]]
    assert [group.tolist() for group in processor.cut([5, 1])] == [[5, 1]]
    assert processor.cut([]) == []
    for limits in ({"token_budget": 0}, {"max_samples": 0}):
        with pytest.raises(ValueError):
            processor.cut([1], **limits)


def test_a_cut_obeys_both_limits(store: TokenStore) -> None:
    ids = [5, 1, 3, 0, 2, 4]
    groups = BatchProcessor(store).cut(ids, token_budget=6, max_samples=2)
    assert sorted(i for group in groups for i in group.tolist()) == sorted(ids)
    for group in groups:
        lengths = store.lengths(group)
        assert len(group) <= 2
        assert lengths.sum() <= 6 or len(group) == 1
        assert abs(ids.index(group[0]) - ids.index(group[-1])) < 2  # neighbours in the step's order


def test_a_micro_batch_is_one_flat_row(store: TokenStore) -> None:
    batch = BatchProcessor(store).build([3, 0])
    assert batch.input_ids.tolist() == [[300, 301, 0, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [[-100, 301, -100, 1, 2, -100, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4]]
    assert batch.cu_seqlens.tolist() == [0, 2, 7]
    assert (batch.input_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert (batch.lengths, batch.sample_ids, batch.num_tokens, batch.num_trained) == ((2, 5), (3, 0), 7, 4)
    moved = batch.to("cpu")
    assert torch.equal(moved.labels, batch.labels)
    assert moved.num_trained == 4


@pytest.mark.parametrize("tokens", [*range(1, 3000, 7), 4095, 4096, 4097, 100_000])
def test_rows_have_few_sizes_and_little_filling(tokens: int) -> None:
    size = row_size(tokens)
    assert tokens <= size < tokens + 8 or size / tokens < 1.032
    assert row_size(size) == size


def test_there_are_thirty_two_sizes_between_powers_of_two() -> None:
    assert len({row_size(tokens) for tokens in range(1025, 2049)}) == 32
