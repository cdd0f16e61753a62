"""What the live view costs a training that it shows: blocks of steps with and without it, in turn.

    python benchmarks/live_view.py [--quick] [--json]

The steps are short (tens of milliseconds) and the view draws into a pseudo-terminal at its usual pace, so a real run
pays less. `ratio` is the processor time of a block with the view by that of one without (median of pairs), `share` the
part of a block's processor time that was spent inside of the view's calls, `draw_ms` that of one picture.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn

from llamahome.monitor.progress import LiveProgress

torch.set_num_threads(1)
Step = Callable[[], float]


def training_step() -> Step:
    """A step of some 20 to 40 ms on one core."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 3072), nn.SiLU(), nn.Linear(3072, 768))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randn(128, 768)

    def step() -> float:
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def record(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "loss": loss, "learning_rate": 1e-4, "tokens_per_second": 4000.0, "memory_peak_bytes": 2e9,
            "memory_limit_bytes": 3e9}  # fmt: skip


def block(step: Step, steps: int, view: LiveProgress | None) -> tuple[float, float]:
    """Processor seconds of the steps, and those of them inside of the view."""
    inside, began = 0.0, time.thread_time()
    for number in range(1, steps + 1):
        loss = step()
        if view is not None:
            entered = time.thread_time()
            view.step(record(number, loss))
            inside += time.thread_time() - entered
    return time.thread_time() - began, inside


def terminal() -> Console:
    """A terminal whose other end somebody reads."""
    reader, writer = pty.openpty()
    threading.Thread(target=_read_all, args=(reader,), daemon=True).start()
    return Console(file=os.fdopen(writer, "w"), force_terminal=True, width=100)


def _read_all(reader: int) -> None:
    with contextlib.suppress(OSError):  # the end: nobody writes any more
        while os.read(reader, 65536):
            pass


def measure(pairs: int, steps: int) -> dict[str, float]:
    step, view = training_step(), LiveProgress(terminal())
    view.start(steps)
    block(step, steps, view)  # warms both up
    ratios, shares = [], []
    for _ in range(pairs):
        without, _inside = block(step, steps, None)
        whole, inside = block(step, steps, view)
        ratios.append(whole / without)
        shares.append(inside / whole)
    began = time.thread_time()
    for number in range(50):
        view.event({"event": "checkpoint", "step": number})  # always drawn
    draw_ms = (time.thread_time() - began) * 1000 / 50
    view.finish()
    return {"ratio": statistics.median(ratios), "share": statistics.median(shares), "draw_ms": draw_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 pairs of blocks instead of 15")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    args = parser.parse_args()
    figures = measure(5 if args.quick else 15, 60)
    if not args.json:
        print(f"with the view {figures['ratio']:.4f} of the time without; {figures['share']:.3%} of it inside of the "
              f"view; {figures['draw_ms']:.2f} ms a picture, at most five a second")  # fmt: skip
    print(json.dumps({name: round(value, 5) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
