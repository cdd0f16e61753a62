"""Memory of a rank by the number of ranks that share the model (FSDP2 over gloo), beside its plan.

    python benchmarks/ranks.py                    # SmolLM2-135M, full and LoRA, by 1, 2 and 4 ranks; about 6 GB at most
    python benchmarks/ranks.py --quick            # full training by 1 and 2 ranks

One sample of 256 tokens in a micro-batch on each rank, bf16, three steps of two micro-batches. The last line of stdout
is a JSON object: `rank_plan_error_max` (largest |planned / measured - 1| of the ranks' peaks, the process included),
and for each case `planned` and `measured` bytes of the rank with the highest peak.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
sys.path.insert(0, str(Path(__file__).parent))

from governor import write_rows

LENGTH, STEPS = 256, 3
CASES = [(method, ranks) for method in ("full", "lora") for ranks in (1, 2, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    figures: dict[str, Any] = {}
    errors = []
    for method, ranks in CASES[:2] if args.quick else CASES:
        found = max(run(method, ranks), key=lambda rank: rank["measured"])
        errors.append(found["planned"] / found["measured"] - 1)
        figures |= {f"{method}_{ranks}_{key}": value for key, value in found.items()}
        if not args.json:
            print(f"{method}, ranks: {ranks}, planned {found['planned'] / 1e6:.0f} MB, measured "
                  f"{found['measured'] / 1e6:.0f} MB ({errors[-1]:+.1%})", flush=True)  # fmt: skip
    print(json.dumps({"rank_plan_error_max": max(map(abs, errors)), **figures}))


def run(method: str, ranks: int) -> list[dict[str, int]]:
    """Planned and measured bytes of each rank. Raises: CalledProcessError when one fails."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, __file__, "--child", json.dumps([folder, method, ranks])]
        write_rows(Path(folder, "rows.jsonl"), LENGTH)
        started = []
        for rank in range(ranks):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in started]
        for process in started:
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command)
        return [json.loads(text.splitlines()[-1]) for text in said]


def child(case: tuple[str, str, int]) -> None:
    """One rank: train, and print the plan of its largest micro-batch beside the peak of its steps."""
    from llamahome.config import Config
    from llamahome.memory.oom import free_memory
    from llamahome.training.parallel import open_place
    from llamahome.training.setup import assemble

    folder, method, ranks = case
    given = {
        "data.path": f"{folder}/rows.jsonl", "data.max_length": LENGTH, "data.validation_split": 0.0,
        "data.train_on": "all", "training.output": f"{folder}/run", "training.memory_limit": "100%",
        "training.method": method, "training.batch_size": 1, "optimization.max_steps": STEPS,
        "optimization.global_batch_size": 2 * ranks, "processing.precision": "bf16", "processing.threads": 1,
        "processing.gradient_checkpointing": False, "processing.compile_mode": "none", "monitor.sinks": ["none"],
        "distributed.strategy": "shard", "resource.min_free_disk": 0,
    }  # fmt: skip
    config = Config.load(None, given)
    with open_place(config, Path(config.training.output)) as place:
        with place.patient():
            loop = assemble(config, place.folder, None, ranks=place.ranks, progress=place.progress).loop
        assert loop.governor is not None
        free_memory()
        loop.governor.monitor.reset_peak()
        records = list(loop)
        plan = loop.governor.plan.at(records[-1]["micro_batch_tokens"])
        print(json.dumps({"planned": plan.total, "measured": max(record["memory_peak_bytes"] for record in records)}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
