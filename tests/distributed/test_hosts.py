"""Two hosts, each a network namespace with torchrun in it: one is cut off in the middle of a step and comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Config
from llamahome.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.root]
STEPS, WIRE = 60, "wire"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Hosts:
    """Two network namespaces, joined by one wire; what runs in them sees the same files."""

    def __init__(self, logs: Path) -> None:
        self.names = [f"llamahome-{os.getpid()}-{number}" for number in (1, 2)]
        self._logs = logs
        self._started: list[subprocess.Popen[bytes]] = []

    def make(self) -> None:
        """Raises: CalledProcessError where the system does not let us."""
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", WIRE, "netns", first, "type", "veth", "peer", "name", WIRE, "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", WIRE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", WIRE, "up")

    def set_wire(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", WIRE, state)

    def start(self, words: list[str]) -> list[subprocess.Popen[bytes]]:
        """torchrun with a rank on each host."""
        return [self._torchrun(number, words) for number in range(2)]

    def _torchrun(self, number: int, words: list[str]) -> subprocess.Popen[bytes]:
        options = [
            "--nnodes=2", "--nproc-per-node=1", "--max-restarts=4", "--monitor-interval=0.1", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={ADDRESSES[0]}:29500", "--rdzv-id=hosts", f"--local-addr={ADDRESSES[number]}",
            f"--rdzv-conf=is_host={1 - number}",  # both have the machine's name
        ]  # fmt: skip
        inside = ["ip", "netns", "exec", self.names[number], sys.executable, "-m", "torch.distributed.run"]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": WIRE, "OMP_NUM_THREADS": "1"}
        with (self._logs / f"host-{number}.log").open("wb") as log:
            process = subprocess.Popen([*inside, *options, "-m", "llamahome", *words], env=environment, stdout=log,
                                       stderr=log, start_new_session=True)  # fmt: skip
        self._started.append(process)
        return process

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._logs.glob("host-*.log")))

    def end(self) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in found.split():
                subprocess.run(["kill", "-KILL", pid], check=False)
            subprocess.run(["ip", "netns", "delete", name], check=False)
        for process in self._started:
            process.wait(timeout=30)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    made = Hosts(tmp_path)
    try:
        made.make()
    except subprocess.CalledProcessError as error:
        made.end()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield made
    made.end()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in records(run) if "event" not in line]


def wait_for_step(run: Path, step: int, hosts: Hosts) -> None:
    deadline = time.monotonic() + 150
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, hosts.log()
        time.sleep(0.01)


def test_a_host_that_was_cut_off_comes_back(place: Any, hosts: Hosts, tmp_path: Path) -> None:
    changes = {"optimization__max_steps": STEPS, "training__save_steps": 2, "distributed__timeout": 4}
    given = place.settings | {key.replace("__", "."): value for key, value in changes.items()}
    calm = train(Config.load(None, given | {"training.output": str(tmp_path / "calm")})).output
    run = tmp_path / "run"
    started = hosts.start(place.train(run, **changes))
    wait_for_step(run, 6, hosts)
    hosts.set_wire("down")
    time.sleep(10)
    state = json.loads((run / "status.json").read_text())
    assert (state["state"], state["code"], state["resumable"]) == ("failed", 8, True), hosts.log()
    assert "rank 1" in state["message"]
    saved = max(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))
    assert saved >= state["last_step"]
    hosts.set_wire("up")
    assert [process.wait(timeout=150) for process in started] == [0, 0], hosts.log()
    found, expected = losses(run), losses(calm)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    assert [line["step"] for line in records(run) if line.get("event") == "resumed"][:1] == [saved]
    assert json.loads((run / "status.json").read_text())["state"] == "done"
