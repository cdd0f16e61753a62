"""Ranks forked from one process that has everything loaded, so that a run of four takes seconds; reads JSON lines.

    {"words": ["train", "--set", ...], "ranks": 4, "environment": {}, "logs": "FOLDER"}

starts the command line in so many processes, as torchrun would, each with its rank for {rank}. It answers with their
ids; when all have ended, with their exit codes (minus the number of the signal that killed one). {"load": MODULE FILE}
imports names listed there.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

MODULES, FOLDER = "MODULES_FILE", "WORKING_FOLDER"


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    values = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"}


def be_a_rank(words: list[str], environment: dict[str, str], log: Path) -> NoReturn:
    """Become the command line with its output in `log`, and end with its exit code."""
    os.environ |= environment
    os.chdir(environment.get(FOLDER, "."))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(file=2)  # SIGABRT leaves the stacks in the log
    sys.argv = ["llamahome", *(word.replace("{rank}", environment.get("RANK", "0")) for word in words)]
    from llamahome.cli import main

    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    if (names := os.environ.get(MODULES)) is not None:
        Path(names).write_text("\n".join(sys.modules))
    sys.stdout.flush()
    os._exit(code)


def start(order: dict[str, Any]) -> list[int]:
    """Process ids of the forked ranks."""
    ranks, port = order["ranks"], free_port()
    pids = []
    for rank in range(ranks):
        environment = (variables(rank, ranks, port) if ranks > 1 else {}) | order.get("environment", {})
        pid = os.fork()
        if pid == 0:
            be_a_rank(order["words"], environment, Path(order["logs"]) / f"rank-{rank}.log")
        pids.append(pid)
    return pids


def load(names: Path) -> None:
    """Import what an earlier process had imported; some modules are made by others and cannot be."""
    for name in names.read_text().splitlines():
        with suppress(Exception):
            importlib.import_module(name)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        if "load" in order:
            load(Path(order["load"]))
            print(json.dumps([]), flush=True)
            continue
        pids = start(order)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
