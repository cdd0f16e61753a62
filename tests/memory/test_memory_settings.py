"""Each memory setting changes what is done: one test for each key that is not tested where it is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llamahome.config import Config
from llamahome.memory.governor import MemoryGovernor
from llamahome.memory.monitor import MemoryReading, limit_of
from llamahome.memory.plan import plan_memory

GB = 10**9
SHAPE = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def cut(device: str, **values: Any) -> int:
    """The token budget on a device of 8 GB under these settings."""
    config = Config.load(None, {f"memory.{key}": value for key, value in values.items()})
    reading = MemoryReading(GB // 10, GB // 10, 8 * GB, 8 * GB)
    monitor = SimpleNamespace(device=device, read=lambda: reading)
    limit = limit_of(config, device, 8 * GB)[1]
    plan = plan_memory(SHAPE, device=device, fused=True)
    governor = MemoryGovernor(limit, plan, monitor, longest_sample=64, step_tokens=10**6, maximum=10**6)  # type: ignore[arg-type]
    return governor.token_budget


def test_cpu_memory_limit_makes_the_cut_smaller_on_a_cpu_alone() -> None:
    assert cut("cpu", cpu_memory_limit="2GB") < cut("cpu", cpu_memory_limit="4GB") < cut("cpu")
    assert cut("cuda", cpu_memory_limit="2GB") == cut("cuda")


def test_gpu_memory_fraction_makes_the_cut_smaller_on_a_gpu_alone() -> None:
    assert cut("cuda", gpu_memory_fraction=0.3) < cut("cuda", gpu_memory_fraction=0.6)
    assert cut("cpu", gpu_memory_fraction=0.3) == cut("cpu", gpu_memory_fraction=0.6)


def test_worker_memory_bounds_the_text_that_is_tokenised_at_once() -> None:
    from llamahome.data.pipeline import Pipeline

    def characters(size: str) -> int:
        return Pipeline([], Config.load(None, {"memory.worker_memory": size}), None, None).batch_chars  # type: ignore[arg-type]

    assert characters("1MiB") == (1 << 20) // 128 < characters("16MiB") < characters("2GB")


def test_cache_size_bounds_the_disk_cache() -> None:
    def bound(**values: Any) -> int:
        return Config.load(None, {key.replace("__", "."): value for key, value in values.items()}).cache_disk_bytes

    assert bound(memory__cache_size="1GB", cache__disk_size="5GB") == GB
    assert bound(memory__cache_size="9GB", cache__disk_size="5GB") == 5 * GB


@pytest.mark.parametrize(("kept", "trims"), [("1MB", True), ("1GB", False)])
def test_gpu_cache_size_decides_when_the_cache_is_emptied(
    monkeypatch: pytest.MonkeyPatch, kept: str, trims: bool
) -> None:
    """As the run asks after every step; the GPU is a stand-in that keeps 100 MB unused."""
    import torch

    from llamahome.config import parse_size
    from llamahome.memory.gpu import trim_gpu_cache

    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200_000_000)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    size = Config.load(None, {"memory.gpu_cache_size": kept}).memory.gpu_cache_size
    assert size is not None
    assert trim_gpu_cache(torch.device("cuda"), parse_size(size)) is trims
    assert bool(calls) is trims
