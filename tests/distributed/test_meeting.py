"""Ranks meet through a store that holds what an earlier start has left, and get one new name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from llamahome.distributed.meeting import meet

SOON = timedelta(seconds=10)


def test_each_start_of_a_group_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as ranks:
        starts = [set(ranks.map(lambda rank: meet(store, rank, 4, SOON), range(4))) for _ in range(5)]
    assert all(len(names) == 1 for names in starts)
    assert len(set.union(*starts)) == 5


def test_what_a_killed_rank_has_said_is_not_taken_for_its_successors_word() -> None:
    store = dist.HashStore()
    store.set("word/1", "of one that was killed before it was answered")
    with ThreadPoolExecutor(2) as ranks:
        first = ranks.submit(meet, store, 0, 2, SOON)
        assert not first.done()
        assert ranks.submit(meet, store, 1, 2, SOON).result() == first.result()


def test_a_rank_that_never_comes_is_named() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as ranks:
        ranks.submit(meet, store, 2, 4, SOON)
        with pytest.raises(RuntimeError, match="no word from rank 1, 3"):
            meet(store, 0, 4, timedelta(seconds=0.3))
