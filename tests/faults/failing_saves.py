"""Saves, retires and replaces as a run does, and ends or fails at one system call after the other.

    LD_PRELOAD=shim.so python failing_saves.py FOLDER ERRNO

For every call that changes the file system: from the same folder a child saves two checkpoints and is killed there
(ERRNO 0), or the call fails with ERRNO. What the child leaves is then judged. Prints the number of calls and the
faults found, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llamahome.errors import LlamaHomeError
from llamahome.files import is_leftover, publish_folder
from llamahome.training.checkpoint import (
    TrainingState,
    checkpoints,
    fault_of,
    load_state,
    newest_good,
    retain,
    save_checkpoint,
)
from llamahome.training.rundir import RunFolder

shim = ctypes.CDLL(None)
KEEP = 2


class Model(nn.Module):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((64, 64), float(step)))

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        save_file({"weight": self.weight.detach()}, folder / "model.safetensors")


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def save(run: Path, step: int) -> None:
    model = Model(step)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    with torch.no_grad():
        model.weight.fill_(float(step))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    save_checkpoint(run, TrainingState(step=step), model, Tokenizer(), optimizer, schedule)


def replace_best(run: Path, step: int) -> None:
    with publish_folder(run / "best") as best:
        for name in ("a", "b"):
            (best / name).write_text(str(step))


def work(run: Path, parent: socket.socket) -> None:
    for step in (6, 7):
        save(run, step)
        parent.send(bytes([step]))
        retain(run, KEEP)
        replace_best(run, step)


def child(run: Path, nth: int, error: int) -> tuple[int, int, int]:
    """Work up to the nth call: exit code (minus the signal), the last acknowledged step, calls in all."""
    reader, writer = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 0
        shim.arm(nth, error)
        try:
            work(run, writer)
        except LlamaHomeError as failed:
            code = failed.exit_code
        except BaseException:
            traceback.print_exc()
            code = 99
        writer.send(b"\0" + str(shim.counted()).encode())
        os._exit(code)
    writer.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with reader:
        steps, _, calls = reader.makefile("rb").read().partition(b"\0")
    return status, max(steps, default=5), int(calls or 0)


def judge(run: Path, acknowledged: int, status: int) -> Iterator[str]:
    if status == 6 and (torn := [path.name for path in run.iterdir() if ".tmp-" in path.name]):
        yield f"left behind: {torn}"
    for path in checkpoints(run):
        if fault := fault_of(path):
            yield f"{path.name} is visible, and {fault}"
    with RunFolder(run, fresh=False):
        newest = newest_good(run)
        step = load_state(newest)[0].step
        if step < acknowledged or newest.name != f"checkpoint-{step}":
            yield f"{newest.name} of step {step}, but step {acknowledged} was acknowledged"
        if not load_file(newest / "model.safetensors")["weight"].eq(step).all():
            yield f"{newest.name} holds other weights"
        best = {path.read_text() if path.exists() else "0" for path in (run / "best" / "a", run / "best" / "b")}
        if len(best) != 1 or int(best.pop()) < acknowledged - 1:
            yield "best is torn or too old"
        names = {path.name for path in run.iterdir() if is_leftover(path)}
    if names:
        yield f"the next run does not clean up {names}"


def main(folder: Path, error: int) -> None:
    torch.set_num_threads(1)
    template = folder / "template"
    template.mkdir()
    for step in (4, 5):
        save(template, step)
    replace_best(template, 5)
    shutil.copytree(template, folder / "whole")
    status, _, calls = child(folder / "whole", 0, 0)
    faults = [] if status == 0 else [f"without a fault: {status}"]
    allowed = (0, 6) if error else (-signal.SIGKILL,)
    for nth in range(1, calls + 1):
        run = Path(shutil.copytree(template, folder / str(nth)))
        status, acknowledged, _ = child(run, nth, error)
        found = [] if status in allowed else [f"ended with {status}"]
        faults += [f"call {nth}: {fault}" for fault in (*found, *judge(run, acknowledged, status))]
        shutil.rmtree(run)
    print(json.dumps({"calls": calls, "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
