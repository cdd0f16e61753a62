"""Events in a person's words, and the command that can be typed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from llamahome.monitor.words import evaluation_text, event_text, program, short_path


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"event": "checkpoint", "step": 500, "path": "checkpoint-500"}, "step 500: saved checkpoint-500"),
        ({"event": "resumed", "step": 500, "checkpoint": "checkpoint-500"}, "step 500: resumed from checkpoint-500"),
        (
            {"event": "cut_changed", "step": 2, "from": 1969, "to": 1600, "reason": "peak above the limit"},
            "step 2: at most 1,600 tokens in a micro-batch, 1,969 before: peak above the limit",
        ),
        (
            {"event": "calibrated", "step": 0, "tokens": 512, "predicted": 1.26e9, "measured": 1.18e9},
            "step 0: 512 tokens tried, 1.26 GB planned and 1.18 GB measured",
        ),
        (
            {"event": "threshold", "resource": "disk", "share": 0.913, "threshold": 0.9},
            "disk 91% in use, the threshold is 90%",
        ),
        (
            {"event": "preflight", "step": 0, "seconds": 6.95, "longest_tokens": 512, "seconds_left": 48.2},
            "step 0: checked in 7 s, longest sample 512 tokens, about 0:00:48 to go",
        ),
        ({"event": "preflight", "step": 8, "seconds": 0.5}, "step 8: preflight: seconds 0.5"),  # of a resumed run
        ({"event": "lunch", "who": "a callback's own"}, "lunch: who a callback's own"),
        ({"event": "oom", "step": 45}, "step 45: oom"),
    ],
)
def test_an_event_is_a_clause(event: dict[str, Any], text: str) -> None:
    assert event_text(event) == text


def test_a_long_value_is_cut() -> None:
    assert event_text({"event": "note", "text": "x" * 1000}) == f"note: text {'x' * 100} ..."


def test_an_evaluation_is_a_clause_whether_event_or_record() -> None:
    said = "step 4: held-out loss 1.306, token accuracy 0.7079"
    record = {"step": 4, "eval_loss": 1.3061, "eval_token_accuracy": 0.7079}
    assert evaluation_text(record) == event_text({"event": "evaluation", **record}) == said


@pytest.mark.parametrize(
    ("typed", "found", "shown"),
    [
        (".venv/bin/llamahome", None, ".venv/bin/llamahome"),
        (".venv/bin/llamahome", "/usr/bin/llamahome", "llamahome"),
        ("/site-packages/llamahome/__main__.py", None, "llamahome"),
    ],
)
def test_a_command_is_shown_as_it_can_be_typed(
    typed: str, found: str | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [typed, "train"])
    monkeypatch.setattr(shutil, "which", lambda name: found)
    assert program() == shown


def test_a_path_is_as_short_as_it_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "output" / "mine") == "output/mine"
    assert short_path(tmp_path.parent / "mine") == str(tmp_path.parent / "mine")
