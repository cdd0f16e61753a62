"""The benchmark of exports counts other tokens as other, and runs through all that it does on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(HERE)
    import exports

    return exports


def test_tokens_are_counted_at_the_end_and_everywhere(exports: Any) -> None:
    margins = [torch.tensor([0.5, 9.0]), torch.tensor([0.25, 0.125, 7.0])]
    wanted = exports.Likeliest([torch.tensor([1, 2]), torch.tensor([3, 4, 5])], margins)
    found = exports.Likeliest([torch.tensor([8, 2]), torch.tensor([3, 8, 8])], [])
    assert exports.compare("x", found, wanted) == {
        "x_same_at_end": 0.5, "x_differ_at_end": 1, "x_same_tokens": pytest.approx(0.4), "x_differ": 3,
        "x_largest_margin": 7.0,
    }  # fmt: skip
    same = exports.compare("x", wanted, wanted)
    assert (same["x_same_at_end"], same["x_same_tokens"], same["x_largest_margin"]) == (1.0, 1.0, 0.0)


def test_a_model_as_it_is_against_its_gguf_files(
    exports: Any, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports.main(["tokens", "--quick", "--model", str(tiny_model_dir), "--export", "gguf-f16"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["prompts"] == 8
    assert figures["prompt_tokens"] > 8 * 20
    assert 0 < figures["gguf-f16_relative_difference"] < 5e-3
    assert figures["gguf-f16_same_tokens"] > 0.98
    assert not any(key.startswith(("bf16", "gguf-q8_0")) for key in figures)


@pytest.mark.slow
def test_merges_of_each_kind_of_adapter(exports: Any, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    exports.main(["merges", "--quick", "--model", str(tiny_model_dir)])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in exports.ADAPTERS:
        assert figures[f"{name}_relative_difference"] <= figures[f"{name}_tolerance"]
        assert figures[f"{name}_adapter_effect"] > 1e-3  # two steps have made it more than zero
