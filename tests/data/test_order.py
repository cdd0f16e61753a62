"""The order of samples: a permutation per epoch, the same for ever."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome import _C
from llamahome.data.dataset import StepOrder

BLOCKS = st.sampled_from([0, 1, 16, 64, 512, 1024])


def order(size: int, seed: int, epoch: int, shuffle: bool = True, block: int = 0) -> np.ndarray:
    out = np.empty(size, np.int64)
    _C.SampleOrder(size, seed, epoch, shuffle, block).fill(0, out)
    return out


@settings(deadline=None)
@given(size=st.integers(0, 5000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**64 - 1), block=BLOCKS)
def test_every_sample_is_there_once(size: int, seed: int, epoch: int, block: int) -> None:
    assert (np.sort(order(size, seed, epoch, block=block)) == np.arange(size)).all()


@settings(deadline=None)
@given(size=st.integers(1, 3000), block=BLOCKS, data=st.data())
def test_any_part_can_be_had_alone(size: int, block: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    part = np.empty(data.draw(st.integers(0, size - start)), np.int64)
    _C.SampleOrder(size, 7, 3, True, block).fill(start, part)
    assert (part == order(size, 7, 3, block=block)[start : start + len(part)]).all()


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run, or a repeated one, relies on these numbers."""
    assert order(10, 42, 0).tolist() == GOLDEN_10
    assert order(1_000_003, 123456789, 5)[[0, 1, 2, 1_000_002]].tolist() == GOLDEN_1M
    assert order(5000, 42, 0, block=64)[[0, 1, 2, 4999]].tolist() == GOLDEN_BLOCKS
    huge = np.empty(3, np.int64)
    _C.SampleOrder(2**62 + 1, 2**64 - 1, 9).fill(2**61, huge)
    assert huge.tolist() == GOLDEN_HUGE


GOLDEN_10 = [2, 6, 7, 4, 0, 9, 5, 3, 8, 1]
GOLDEN_1M = [94147, 948476, 498327, 292970]
GOLDEN_BLOCKS = [3039, 3817, 3034, 4707]
GOLDEN_HUGE = [1980553859763561597, 1472279182695547478, 3569213504830625841]


@pytest.mark.parametrize("block", [16, 64, 256])
def test_blocks_stay_in_a_window_and_are_well_mixed_there(block: int) -> None:
    size = 50 * 1024
    orders = [order(size, seed, 0, block=block) for seed in range(5)]
    same = []
    for found in orders:
        for window in found.reshape(-1, 1024):
            assert len(np.unique(window // block)) == 1024 // block
        same.append(np.diff(found // block) == 0)
    rate = np.mean(same)
    expected = (block - 1) / 1023  # of two samples drawn from a window
    assert abs(rate - expected) < 5 * math.sqrt(expected / np.size(same)) + 1 / 1024
    # Blocks are spread over the whole epoch: the mean place of the first window's samples.
    first = np.mean([found[:1024].mean() / size for found in orders])
    assert abs(first - 0.5) < 5 / math.sqrt(12 * 5 * 1024 / block)


def test_without_shuffle_the_order_is_the_store_s() -> None:
    assert (order(777, 5, 2, shuffle=False) == np.arange(777)).all()


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = [tuple(order(50, seed, epoch)) for seed in range(20) for epoch in range(20)]
    assert len(set(orders)) == 400


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_are_equally_likely(size: int) -> None:
    """Chi-square over all size! permutations; 5 sigma."""
    trials = 6000
    found = [tuple(order(size, seed, 0)) for seed in range(trials)]
    expected = trials / math.factorial(size)
    chi2 = sum((found.count(p) - expected) ** 2 / expected for p in itertools.permutations(range(size)))
    freedom = math.factorial(size) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_the_shuffle_is_even() -> None:
    """Where samples land, and how far neighbours part, over 400 epochs of 512 samples; 5 sigma."""
    size, epochs, bins = 512, 400, 16
    orders = np.array([order(size, 1, epoch) for epoch in range(epochs)])
    counts = np.zeros((bins, bins))
    np.add.at(counts, (np.tile(np.arange(size) * bins // size, epochs), orders.ravel() * bins // size), 1)
    expected = size * epochs / bins**2
    freedom = (bins - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)
    steps = np.abs(np.diff(orders, axis=1)).mean()
    assert abs(steps - (size + 1) / 3) < 5 * size / math.sqrt(18 * size * epochs)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(), st.booleans(), BLOCKS)
def test_steps_hold_each_sample_once_per_epoch(samples, per_step, seed, shuffle, block) -> None:
    steps = StepOrder(samples, per_step, seed, shuffle, block)
    for epoch in range(3):
        first = epoch * steps.steps_per_epoch
        parts = [steps.samples(first + i) for i in range(steps.steps_per_epoch)]
        assert all(len(part) == per_step for part in parts[:-1])
        assert 1 <= len(parts[-1]) <= per_step
        assert (np.sort(np.concatenate(parts)) == np.arange(samples)).all()
        assert steps.epoch(first) == epoch
    assert steps.samples(0).dtype == np.int64


def test_a_step_is_found_without_the_steps_before() -> None:
    steps = StepOrder(2**40, 8, seed=1)
    assert len(steps.samples(10**11)) == 8
    assert (steps.samples(10**11) == StepOrder(2**40, 8, seed=1).samples(10**11)).all()


@pytest.mark.parametrize(("samples", "per_step", "block"), [(0, 4, 0), (4, 0, 0), (-1, 1, 0), (4, 4, 3), (4, 4, -1)])
def test_impossible_steps_are_refused(samples: int, per_step: int, block: int) -> None:
    with pytest.raises(ValueError):
        StepOrder(samples, per_step, 0, block=block)
