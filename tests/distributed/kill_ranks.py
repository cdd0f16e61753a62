"""Kill a random rank again and again in one run of 60 steps; the run must be the one that nobody disturbed.

    python tests/distributed/kill_ranks.py FOLDER --ranks 2 --kills 20 --seed 0

The ranks are started by torchrun's own agent, each anew: forked from it, which has threads, they can deadlock. A
killer lets the run come some steps further, waits a random moment and sends SIGKILL to a random rank. Every step must
be recorded once, with the loss of the undisturbed run to 1e-5. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from tiny_run import settings
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

STEPS = 60


def rank_of_the_run(words: list[str]) -> None:
    """What each process does: the command line."""
    sys.argv = ["llamahome", *words]
    from llamahome.cli import main

    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"ended with code {end.code}") from end


def launch(words: list[str], ranks: int, restarts: int) -> None:
    """Raises: ChildFailedError when the run does not end well."""
    config = LaunchConfig(
        1, 1, ranks, run_id="kills", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
        start_method="spawn", local_addr="127.0.0.1", monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, rank_of_the_run)(words)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(int(line["step"]), float(line["loss"])) for line in lines if "event" not in line]
    assert len(steps) == len(dict(steps)), "a step is recorded twice"
    return dict(steps)


def children(pid: int) -> list[int]:
    """Live ranks that `pid` has started: not the killer, nor multiprocessing's resource tracker."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def kill(parent: int, run: Path, kills: int, chance: random.Random, log: Path) -> None:
    """The killer: `kills` times, spread over the steps of the run."""
    for number in range(kills):
        wanted = number * (STEPS - 4) // kills
        while _newest_step(run) < wanted:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.4))
        while not (targets := children(parent)):
            time.sleep(0.01)
        os.kill(chance.choice(targets), signal.SIGKILL)
        log.write_text(str(number + 1))
        while len(set(children(parent)) & set(targets)) > 0:  # the agent ends the others before it starts all again
            time.sleep(0.01)


def _newest_step(run: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max(int(json.loads(line).get("step", 0)) for line in lines)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="an empty folder [default: a temporary one]")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(disturbed(args.folder or Path(temporary), args.ranks, args.kills, args.seed)))


def disturbed(folder: Path, ranks: int, kills: int, seed: int) -> dict[str, object]:
    """Figures of the comparison. Raises: AssertionError when the runs differ."""
    log = folder / "kills"
    given = settings(folder, optimization__max_steps=STEPS, training__save_steps=1, lora__dropout=0.0,
                     training__eval_samples=4, training__keep_last=2, optimization__global_batch_size=8)  # fmt: skip

    def words(name: str) -> list[str]:
        changed = given | {"training.output": str(folder / name)}
        return ["train", *(word for key, value in changed.items() for word in ("--set", f"{key}={json.dumps(value)}"))]

    launch(words("calm"), ranks, 0)
    began, killer = time.monotonic(), os.fork()
    if killer == 0:
        with suppress(FileNotFoundError, ProcessLookupError):
            kill(os.getppid(), folder / "run", kills, random.Random(seed), log)
        os._exit(0)
    launch(words("run"), ranks, 2 * kills)
    seconds = time.monotonic() - began
    os.kill(killer, signal.SIGKILL)
    os.waitpid(killer, 0)
    expected, found = losses(folder / "calm"), losses(folder / "run")
    assert list(found) == list(expected) == list(range(1, STEPS + 1)), sorted(found)
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert worst <= 1e-5, worst
    state = json.loads((folder / "run" / "status.json").read_text())
    assert (state["state"], state["last_step"]) == ("done", STEPS), state
    done = int(log.read_text()) if log.exists() else 0
    assert done == kills, f"the run ended after {done} kills"
    return {"ranks": ranks, "kills": done, "steps": len(found), "largest_difference": worst, "seconds": round(seconds)}


if __name__ == "__main__":
    main()
