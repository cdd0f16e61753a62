"""Saves, retires and replaces as a run does, and ends or fails at one system call after the other.

    LD_PRELOAD=shim.so python failing_saves.py FOLDER ERRNO

For every call that changes the file system: from the same folder a child saves two checkpoints and is killed there
(ERRNO 0), or the call fails with ERRNO. What the child leaves is then judged. Prints the number of calls and the
faults found, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from failing import Say, at_every_call
from safetensors.torch import load_file, save_file
from torch import nn

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


def work(run: Path, say: Say) -> None:
    for step in (6, 7):
        save(run, step)
        say(bytes([step]))
        retain(run, KEEP)
        replace_best(run, step)


def judge(run: Path, said: bytes, status: int) -> Iterator[str]:
    acknowledged = max(said, default=5)
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
    print(json.dumps(at_every_call(folder, error, template, work, judge)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
