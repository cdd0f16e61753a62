"""Ranks take the smallest budget of all, and an out-of-memory leaves a smaller one for the restart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llamahome.memory.agree import agree_on_budget, keep_smaller_budget, kept_budget

RANK = """
import sys
import torch.distributed as dist
from llamahome.memory.agree import agree_on_budget
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
print(agree_on_budget([1024, 640][rank]), agree_on_budget([64, 2048][rank]))
dist.destroy_process_group()
"""


def test_every_rank_takes_the_smallest_budget(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    assert [rank.communicate(timeout=60)[0].split() for rank in ranks] == [["640", "64"]] * 2


def test_one_process_keeps_its_own_budget() -> None:
    assert agree_on_budget(777) == 777


def test_a_kept_budget_only_falls(tmp_path: Path) -> None:
    assert kept_budget(tmp_path) is None
    assert keep_smaller_budget(tmp_path, 1000) == 500
    assert keep_smaller_budget(tmp_path, 1000) == 500  # another rank, the same step
    assert keep_smaller_budget(tmp_path, 4000) == 500
    assert keep_smaller_budget(tmp_path, 500) == 250
    assert kept_budget(tmp_path) == 250
