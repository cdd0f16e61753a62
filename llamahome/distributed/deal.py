"""Which rank gets which samples of a step, so that all finish together."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def deal(lengths: Sequence[int] | NDArray[np.integer[Any]], ranks: int) -> list[Ids]:
    """Positions of the samples for each rank: the longest first, each to the rank with the fewest tokens so far.

    Longest processing time first (Graham 1969): the largest share is at most 4/3 - 1/(3 ranks) of the best possible.
    Every sample is in one share, and within a share they keep the step's order. Deterministic; ties go to the lower
    rank.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for position in np.argsort(-np.asarray(lengths, np.int64), kind="stable"):
        load, rank = heapq.heappop(loads)
        shares[rank].append(int(position))
        heapq.heappush(loads, (load + int(lengths[position]), rank))
    return [np.array(sorted(share), np.int64) for share in shares]


def even_out(groups: Sequence[Ids], count: int) -> list[Ids]:
    """`count` groups of the same samples: the largest are halved, and empty ones fill up what is missing.

    Under FSDP every micro-batch is a set of collectives, so that all ranks need the same number of them.
    """
    groups = list(groups)
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]), default=None)
        if largest is None or len(groups[largest]) < 2:
            return groups + [np.empty(0, np.int64)] * (count - len(groups))
        middle = len(groups[largest]) // 2
        groups[largest : largest + 1] = [groups[largest][:middle], groups[largest][middle:]]
    return groups
