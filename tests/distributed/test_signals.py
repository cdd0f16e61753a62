"""A signal of one rank is that of all, at whatever moment it comes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from llamahome.distributed.ranks import Ranks
from llamahome.training.signals import Asked, StopSignal, agree


@dataclass(frozen=True)
class Two(Ranks):
    """This rank and one that asks for `other`; while they ask each other, `meanwhile` happens."""

    size: int = 2
    other: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    meanwhile: Callable[[], object] = lambda: None

    def largest(self, values: Sequence[float]) -> list[float]:
        self.meanwhile()
        return [max(pair) for pair in zip(values, self.other, strict=True)]


@pytest.mark.parametrize(
    ("number", "asked"),
    [(signal.SIGTERM, Asked(signal.SIGTERM, False, False)), (signal.SIGUSR1, Asked(None, True, False))],
)
def test_one_that_comes_while_ranks_ask_each_other_is_not_lost(number: signal.Signals, asked: Asked) -> None:
    with StopSignal() as signals:
        assert agree(Two(meanwhile=lambda: signal.raise_signal(number)), signals) == Asked(None, False, False)
        assert agree(Two(), signals) == asked


def test_what_another_rank_was_told_is_not_this_ranks_first_signal() -> None:
    """torchrun sends SIGTERM to each rank in turn: a second one would end this rank in the middle of its save."""
    with StopSignal() as signals:
        assert agree(Two(other=[float(signal.SIGTERM), 0.0, 0.0]), signals).ends
        signal.raise_signal(signal.SIGTERM)
        assert signals.stop == signal.SIGTERM


def test_a_wish_of_one_rank_is_that_of_all() -> None:
    assert agree(Two(other=[0.0, 0.0, 1.0]), StopSignal()) == Asked(None, False, True)
