"""The model card says what a model is made of, and nothing of the machine that made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamahome.model.card import model_card

FACTS: dict[str, Any] = {
    "data_fingerprint": "d246", "model_fingerprint": "7968", "precision": "bf16", "total_steps": 2,
    "config": {
        "training": {"method": "qlora", "output": "/home/somebody/run"}, "lora": {"rank": 8},
        "data": {"path": "~/secret.jsonl", "max_length": 512}, "cache": {"disk_size": 5},
    },
}  # fmt: skip
LINES = (
    {"event": "evaluation", "step": 0, "eval_loss": 3.5},
    {"step": 1, "loss": 3.0, "tokens": 40},
    {"step": 2, "loss": 2.5, "tokens": 41, "eval_loss": 2.75},
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "final").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(FACTS))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    return tmp_path


def rows(card: str) -> dict[str, str]:
    cells = (line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ") and line != "| | |")
    return {key: value.strip("`") for key, value in cells}


@pytest.mark.parametrize("inside", [False, True])
def test_it_has_fingerprint_settings_and_the_last_figures(run: Path, inside: bool) -> None:
    card = model_card("mine", "some/base", run / "final" if inside else run, "merged in float32: as trained")
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert 'base_model: "some/base"' in head
    assert body.startswith("\n# mine\n\nmerged in float32: as trained\n")
    found = rows(card)
    assert (found["data_fingerprint"], found["model_fingerprint"], found["precision"]) == ("d246", "7968", "bf16")
    assert (found["training.method"], found["lora.rank"], found["data.max_length"]) == ('"qlora"', "8", "512")
    assert (found["step"], found["loss"], found["tokens"], found["eval_loss"]) == ("2", "2.5", "41", "2.75")


def test_paths_of_the_machine_stay_out(run: Path) -> None:
    card = model_card("mine", "/home/somebody/base", run, "as trained")
    assert "somebody" not in card
    assert "secret" not in card
    assert "base_model" not in card


def test_a_line_that_was_being_written_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 2.')
    assert rows(model_card("mine", None, run, "as trained"))["step"] == "2"


def test_a_model_without_a_run_has_its_proof_alone(tmp_path: Path) -> None:
    card = model_card("mine", None, tmp_path, "as trained")
    assert card.endswith("# mine\n\nas trained\n\n") or card.endswith("# mine\n\nas trained\n")
    assert "##" not in card
