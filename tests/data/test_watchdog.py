"""A time limit for other people's code that neither leaks into ours nor misses."""

from __future__ import annotations

import time

import pytest

from llamahome.data.watchdog import TimeLimit, Watchdog


def spin() -> None:
    while True:
        pass


def test_a_loop_is_stopped_and_the_next_call_runs():
    with Watchdog(0.1) as watchdog:
        for _ in range(2):
            with pytest.raises(TimeLimit):
                watchdog.run(spin)
            assert watchdog.run(lambda: 5) == 5


def test_each_call_has_the_whole_time():
    with Watchdog(0.5) as watchdog:
        for _ in range(8):
            watchdog.run(lambda: time.sleep(0.1))


def test_errors_pass_through():
    with Watchdog(1) as watchdog, pytest.raises(ZeroDivisionError):
        watchdog.run(lambda: 1 / 0)
