"""Train for an hour with a fault a minute: nothing may be lost, memory stays flat, the bytes at the end are the same.

    python tests/faults/soak.py --minutes 60 --every 60 --seed 0

One long run after the other on a tiny model. Faults, drawn at random: SIGKILL, SIGTERM, SIGUSR1, a stop of some
seconds, the newest checkpoint damaged or cut short, memory denied for some seconds (RLIMIT_DATA), and a full disk where
this may mount one (root; a tmpfs in a mount namespace of its own). After each, all checkpoints but a damaged one are
whole, the newest is not older than what was acknowledged, and the run goes on. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from kill_runs import Outcome, acknowledged, outcome
from tiny_run import settings

from llamahome.training.checkpoint import checkpoints, fault_of

SAVE_EVERY = 50
DISK_MIB = 48
SETTLED_BYTES = 20_000  # of records in a life, some 50 steps; what memory grows afterwards is counted


@dataclass
class Watched:
    """A life of the run: its process, and what it used."""

    process: subprocess.Popen[bytes]
    metrics: Path
    recorded_bytes: int
    settled_bytes: int = 0
    last_bytes: int = 0

    def sample(self) -> None:
        if rss := _status_kib(self.process.pid, "VmRSS"):
            self.last_bytes = 1024 * rss
            if not self.settled_bytes and _size(self.metrics) > self.recorded_bytes + SETTLED_BYTES:
                self.settled_bytes = self.last_bytes

    @property
    def growth(self) -> int:
        return self.last_bytes - self.settled_bytes if self.settled_bytes else 0


@dataclass
class Soak:
    folder: Path
    steps: int
    chance: random.Random
    can_fill: bool
    faults: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    growths: list[int] = field(default_factory=list)
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    is_done: bool = False

    def __post_init__(self) -> None:
        given = settings(
            self.folder, optimization__max_steps=self.steps, training__save_steps=SAVE_EVERY,
            training__eval_steps=self.steps // 4,
        )  # fmt: skip
        self.pairs = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        self.run = self.folder / "disk" / "run"
        self.life: Watched | None = None
        self.damaged: set[str] = set()

    def start(self) -> Watched:
        """The next life: the run goes on, or a new one begins."""
        known = checkpoints(self.run)
        words = ["train-resume", str(self.run)] if known else ["train", *self.pairs, "--output", str(self.run)]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "llamahome", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        metrics = self.run / "metrics.jsonl"
        self.life = Watched(process, metrics, _size(metrics))
        return self.life

    def wait(self, seconds: float) -> int | None:
        """The exit code when the life ends within that time."""
        assert self.life is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.life.sample()
            if (code := self.life.process.poll()) is not None:
                self.growths.append(self.life.growth)
                return code
            time.sleep(0.5)
        return None

    def ended(self, code: int, allowed: tuple[int, ...]) -> None:
        """Judge what a life left."""
        self.codes[str(code)] += 1
        if code not in allowed:
            self.lost.append(f"ended with {code} instead of {allowed}: {_tail(self.folder / 'log')}")
        for path in checkpoints(self.run):
            if (fault := fault_of(path)) and path.name not in self.damaged:
                self.lost.append(f"{path.name}: {fault}")
        good = [int(path.name.partition("-")[2]) for path in checkpoints(self.run) if fault_of(path) is None]
        if not self.damaged and max(good, default=0) < acknowledged(self.run):
            self.lost.append(f"step {acknowledged(self.run)} was acknowledged, {max(good, default=0)} is there")
        self.damaged.clear()

    def damage(self, how: str) -> None:
        """Change a byte of the newest checkpoint, or cut off its end; there is an older one to fall back to."""
        found = checkpoints(self.run)
        if len(found) < 2:
            return
        path = self.chance.choice(sorted(path for path in found[-1].rglob("*") if path.stat().st_size))
        content = bytearray(path.read_bytes())
        at = self.chance.randrange(len(content))
        if how == "flip":
            content[at] ^= 1 << self.chance.randrange(8)
        else:
            del content[at:]
        path.write_bytes(content)
        self.damaged.add(found[-1].name)

    def inject(self, fault: str) -> None:
        """One fault, and the end of the life that it ends; the next one may then start."""
        assert self.life is not None
        pid = self.life.process.pid
        self.faults[fault] += 1
        match fault:
            case "kill" | "flip" | "cut":
                self.life.process.kill()
                code = self.wait(30)
                if fault != "kill":
                    self.damage(fault)
                allowed: tuple[int, ...] = (-signal.SIGKILL,)
            case "term":
                self.life.process.terminate()
                code, allowed = self.wait(60), (143,)
            case "save" | "stop":
                self.life.process.send_signal(signal.SIGUSR1 if fault == "save" else signal.SIGSTOP)
                code, allowed = self.wait(5), (0,)
                self.life.process.send_signal(signal.SIGCONT)
            case "memory":
                data = 1024 * (_status_kib(pid, "VmData") or 0)
                resource.prlimit(pid, resource.RLIMIT_DATA, (data + (1 << 20), resource.RLIM_INFINITY))
                code, allowed = self.wait(5), (0, 5)
                if code is None:
                    resource.prlimit(pid, resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            case _:
                filler = self.run.parent / "filler"
                free = shutil.disk_usage(filler.parent).free
                filler.write_bytes(bytes(max(0, free - 4096)))
                code, allowed = self.wait(60), (0, 6)
                filler.unlink()
        if code is not None:
            self.ended(code, allowed)
            self.life = None
            self.is_done = code == 0

    def finished(self, expected: Outcome) -> None:
        """A run got to its end: is it what the undisturbed one was?"""
        figures, files = outcome(self.run, self.steps)
        differing: list[object] = [name for name in files if files[name] != expected[1][name]]
        differing += [pair for pair in zip(figures, expected[0], strict=False) if not _same(*pair)][:2]
        if differing or len(figures) != len(expected[0]):
            self.lost.append(f"run {self.runs} differs, {len(figures)} steps: {differing}")
        self.runs += 1
        shutil.rmtree(self.run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=60, help="seconds between faults, on average")
    parser.add_argument("--steps", type=int, default=4000, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.geteuid() == 0 and shutil.which("unshare") and "LLAMAHOME_SOAK_MOUNTS" not in os.environ:
        os.environ["LLAMAHOME_SOAK_MOUNTS"] = "1"
        os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "disk").mkdir()
        can_fill = "LLAMAHOME_SOAK_MOUNTS" in os.environ
        if can_fill:
            size = f"size={DISK_MIB}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", Path(name) / "disk"], check=True)
        try:
            soak = Soak(Path(name), args.steps, random.Random(args.seed), can_fill)
            print(json.dumps(go(soak, args.minutes, args.every)), flush=True)
        finally:
            if can_fill:
                subprocess.run(["umount", Path(name) / "disk"], check=True)
    sys.exit(bool(soak.lost))


def go(soak: Soak, minutes: float, every: float) -> dict[str, object]:
    """The undisturbed run, then faults for so many minutes."""
    began = time.monotonic()
    soak.start()
    assert soak.wait(3600) == 0, _tail(soak.folder / "log")
    calm, expected = soak.growths.pop(), outcome(soak.run, soak.steps)
    shutil.rmtree(soak.run)
    print(f"undisturbed: {time.monotonic() - began:.0f} s, grew by {calm / 1e6:.1f} MB", file=sys.stderr)
    kinds = ["kill", "flip", "cut", "term", "save", "stop", "memory", *["disk"] * soak.can_fill]
    began = time.monotonic()
    soak.life = None
    while time.monotonic() - began < 60 * minutes:
        if soak.life is None:
            soak.start()
        code = soak.wait(soak.chance.uniform(0.5, 1.5) * every)
        if code is None:
            soak.inject(soak.chance.choice(kinds))
        else:
            soak.life, soak.is_done = None, code == 0
            soak.ended(code, (0,))
        if soak.is_done:
            soak.is_done = False
            soak.finished(expected)
        said = f"{(time.monotonic() - began) / 60:.1f} min, {soak.runs} runs, {dict(soak.faults)}, {soak.lost}"
        print(said, file=sys.stderr, flush=True)
    if soak.life is not None:
        soak.inject("kill")
    return {
        "minutes": round((time.monotonic() - began) / 60, 1), "faults": sum(soak.faults.values()),
        **{f"faults_{kind}": soak.faults[kind] for kind in kinds}, "finished_runs": soak.runs, "lost": len(soak.lost),
        "calm_growth_bytes": calm, "largest_growth_bytes": max(soak.growths, default=0), "what_was_lost": soak.lost,
    }  # fmt: skip


def _same(found: list[Any], expected: list[Any]) -> bool:
    """Equal figures of a step; an evaluation's cut is smaller after an out-of-memory, which is another rounding."""
    *exact, loss = expected
    return found[:-1] == exact and (found[-1] == loss or math.isclose(found[-1], loss, rel_tol=1e-6))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _status_kib(pid: int, name: str) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-3:])


if __name__ == "__main__":
    main()
