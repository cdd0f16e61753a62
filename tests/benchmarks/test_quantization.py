"""Training for quantization is compared with quantizing afterwards, on the same samples and by the same rounding."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchao")
HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quantization(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    import quantization

    return quantization


@pytest.mark.slow
def test_quick_qat_ends_in_the_figures_of_both_trainings(quantization, tiny_model_dir, tmp_path, monkeypatch, capsys):
    words = ["qat", "--quick", "--json", "--model", str(tiny_model_dir), "--output", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["quantization.py", *words])
    quantization.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["full_steps"] == found["qat_steps"] == 4
    assert found["plain_loss"] == pytest.approx(found["full_loss_after"], rel=0.01)
    assert found["ptq_loss"] != found["plain_loss"]
    assert found["qat_loss"] == pytest.approx(found["qat_loss_after"], rel=0.01)
    cost, back = found["ptq_loss"] - found["plain_loss"], found["ptq_loss"] - found["qat_loss"]
    assert found["recovered"] == pytest.approx(back / cost)
    quantization.main()  # finished runs are not done again
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["qat_loss"] == found["qat_loss"]


def test_each_scheme_has_a_run_of_its_own_and_all_share_the_plain_one(quantization):
    def outputs(scheme: str) -> list[Path]:
        args = argparse.Namespace(output="runs", scheme=scheme)
        return [quantization.output_of(args, method) for method in ("full", "qat")]

    folders = [folder for scheme in (quantization.PAIRED, quantization.INT4) for folder in outputs(scheme)]
    assert len(set(folders)) == 3
    assert all(folder.parent == Path("runs") for folder in folders)
