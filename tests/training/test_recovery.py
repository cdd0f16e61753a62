"""After the kernel killed a run for want of memory, and only then, its next try cuts steps smaller."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llamahome.memory.agree import kept_budget
from llamahome.memory.cgroup import oom_kills
from llamahome.training import recovery


@pytest.mark.parametrize(("code", "kills", "kept"), [(137, 1, 512), (137, 0, None), (1, 1, None)])
def test_a_kill_by_the_kernel_halves_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kills: int, kept: int | None
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "memory_plan": {"micro_batch_tokens": 1024}}))
    counted, ends = iter([0, kills, kills]), iter([code, 0])
    monkeypatch.setattr(recovery, "oom_kills", lambda: next(counted, kills))
    monkeypatch.setattr(recovery, "_run", lambda command: (next(ends), 1, False))
    assert recovery.supervise(["train"], ["train-resume"], tmp_path, 2) == 0
    assert kept_budget(tmp_path) == kept


def test_a_kill_before_the_plan_was_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, ends = iter([0, 1, 1]), iter([137, 0])
    monkeypatch.setattr(recovery, "oom_kills", lambda: next(counted))
    monkeypatch.setattr(recovery, "_run", lambda command: (next(ends), 1, False))
    assert recovery.supervise(["train"], ["train-resume"], tmp_path, 2) == 0
    assert kept_budget(tmp_path) is None


def test_the_kernels_count_is_read(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("pgfault 5\noom_kill 3\n")
    assert oom_kills(tmp_path) == 3
    assert oom_kills(tmp_path / "none") == 0
    if sys.platform == "linux":
        assert oom_kills() >= 0
