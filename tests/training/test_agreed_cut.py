"""One of two ranks runs out of memory in a step: the run goes on with a smaller cut, and trains the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
LOSS = '''
import os
from pathlib import Path
from llamahome.kernels import linear_cross_entropy

def failing(hidden, weight, labels, **options):
    """Rank 1 runs out of memory in its first micro-batch of a step, once."""
    if os.environ["RANK"] == "1" and hidden.requires_grad and not Path("failed").exists():
        Path("failed").touch()
        raise MemoryError
    return linear_cross_entropy(hidden, weight, labels, **options)
'''


def two_ranks(folder: Path, settings: dict[str, Any], strategy: str) -> tuple[str, list[dict[str, Any]]]:
    """What torchrun printed and the records of the run, which must end well."""
    folder.mkdir()
    (folder / "own.py").write_text(LOSS)
    changes = {
        "training.output": "run", "training.loss": "own:failing", "distributed.strategy": strategy,
        "optimization.max_steps": 4, "optimization.global_batch_size": 8, "lora.dropout": 0.0,
        "distributed.timeout": 60,
    }  # fmt: skip
    words = [f"{key}={json.dumps(value)}" for key, value in (settings | changes).items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
         "-m", "llamahome", "train", *(part for word in words for part in ("--set", word))],
        cwd=folder, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "failed").exists()
    return done.stderr, [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_a_replica_replays_its_share_and_a_sharded_run_starts_again_smaller(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    _, replicated = two_ranks(tmp_path / "replicate", settings, "replicate")
    said, sharded = two_ranks(tmp_path / "shard", settings, "shard")
    steps = [[record for record in records if "event" not in record] for records in (replicated, sharded)]
    assert [record["step"] for record in steps[0]] == [record["step"] for record in steps[1]] == [1, 2, 3, 4]
    for ours, theirs in zip(*steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    kept = json.loads((tmp_path / "shard/run/token_budget.json").read_bytes())["token_budget"]
    assert f"a restart takes at most {kept} tokens" in said
    assert all(record["micro_batch_tokens"] <= kept for record in steps[1])
    assert not (tmp_path / "replicate/run/token_budget.json").exists()
