"""An adapter on a 4-bit base begins with its rounding errors in it, whatever the cut, and only at the run's start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llamahome.config import Config
from llamahome.errors import MemoryLimitError
from llamahome.training import begin
from llamahome.training.begin import _first_samples
from llamahome.training.run import train

pytest.importorskip("bitsandbytes")


def begun(settings: dict[str, Any], tmp_path: Any, name: str, **changes: Any) -> tuple[float, dict[str, Any]]:
    """Held-out loss at the start, and the adapter after one step that moves nothing."""
    still = {"optimization.max_steps": 1, "optimization.learning_rate": 1e-30, "training.method": "qlora"}
    result = train(Config.load(None, settings | still | {"training.output": str(tmp_path / name)} | changes))
    return result.before.loss, load_file(result.output / "final" / "adapter_model.safetensors")


def test_it_is_nearer_to_the_model_before_rounding(settings: Any, tmp_path: Any) -> None:
    plain, _ = begun(settings, tmp_path, "plain", **{"training.method": "lora"})
    rounded, zero = begun(settings, tmp_path, "rounded", **{"lora.absorb_rounding": False, "lora.rank": 48})
    corrected, adapter = begun(settings, tmp_path, "corrected", **{"lora.rank": 48})
    assert abs(corrected - plain) < 0.5 * abs(rounded - plain)
    assert all(float(tensor.abs().max()) < 1e-9 for name, tensor in zero.items() if "lora_B" in name)
    assert all(float(tensor.abs().max()) > 1e-3 for name, tensor in adapter.items())


def test_the_cut_does_not_change_it(settings: Any, tmp_path: Any) -> None:
    expected = begun(settings, tmp_path, "first")[1]
    found = begun(settings, tmp_path, "second", **{"training.batch_size": 1})[1]
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_it_looks_at_the_first_samples_of_the_run(store: Any) -> None:
    """Of 40 samples with 2 to 60 tokens all are taken, of a longer store so many as have 2,048 tokens together."""
    config = Config.load(None, {"data.shuffle": False})
    assert _first_samples(store, config, packs=True).tolist() == list(range(40))
    assert _first_samples(store, config, packs=False).tolist() == [0]
    many = _Lengths(np.full(5000, 100))
    assert _first_samples(many, config, packs=True).tolist() == list(range(20))
    assert _first_samples(_Lengths(np.full(3, 4000)), config, packs=True).tolist() == [0]


@pytest.mark.parametrize("failures", [1, 2])
def test_without_memory_it_is_tried_twice_and_then_said(
    settings: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    expected = begun(settings, tmp_path, "expected")[1]
    absorb, left = begin.absorb_rounding_error, [failures]

    def failing(*arguments: Any) -> float:
        share: float = absorb(*arguments)
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("unable to mmap 8 bytes from file: Cannot allocate memory (12)")
        return share

    monkeypatch.setattr(begin, "absorb_rounding_error", failing)
    if failures == 1:
        found = begun(settings, tmp_path, "found")[1]
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
        return
    with pytest.raises(MemoryLimitError, match="rounding errors") as caught:
        begun(settings, tmp_path, "found")
    assert caught.value.fix == "raise it, or set lora.absorb_rounding: false"


class _Lengths:
    def __init__(self, lengths: Any) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self, ids: Any) -> Any:
        return self._lengths[ids]
