"""Unused GPU memory is given back above the limit, and only there."""

from __future__ import annotations

import pytest
import torch

from llamahome.memory.gpu import trim_gpu_cache


@pytest.mark.parametrize(("device", "kept", "emptied"), [("cuda", 99, True), ("cuda", 100, False), ("cpu", 0, False)])
def test_the_cache_is_emptied_above_the_limit(monkeypatch, device, kept, emptied):
    calls = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    assert trim_gpu_cache(torch.device(device), kept) is emptied
    assert bool(calls) is emptied
