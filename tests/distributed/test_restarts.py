"""Where a group of ranks that is started again goes on: torchrun's count of restarts is not to be relied on alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llamahome.distributed.ranks import ALONE
from llamahome.training.parallel import goes_on_from

AGAIN = replace(ALONE, restarts=1)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with checkpoints, begun under the name that torchrun has now, and killed."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "launch": "ours"}))
    (tmp_path / "status.json").write_text(json.dumps({"state": "running"}))
    return tmp_path


def test_a_torchrun_that_was_itself_started_anew_knows_its_run_by_name(run: Path) -> None:
    assert goes_on_from(run, None, ALONE) == run


def test_another_groups_run_is_not_gone_on_with(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "theirs")
    assert goes_on_from(run, None, ALONE) is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert goes_on_from(run, None, ALONE) is None


def test_a_run_that_is_done_is_not_gone_on_with_by_its_name(run: Path) -> None:
    (run / "status.json").write_text(json.dumps({"state": "done"}))
    assert goes_on_from(run, None, ALONE) is None


def test_a_restart_goes_on_or_begins_anew(run: Path) -> None:
    assert goes_on_from(run, None, AGAIN) == run
    (run / "checkpoint-4").rmdir()
    (run / "best").mkdir()
    assert goes_on_from(run, None, AGAIN) is None
    assert not (run / "best").exists()


def test_a_checkpoint_that_was_named_counts_until_the_group_has_its_own(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = run / "checkpoint-4"
    assert goes_on_from(run, named, ALONE) == named
    assert goes_on_from(run, named, AGAIN) == run
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "theirs")
    assert goes_on_from(run, named, AGAIN) == named
