"""A callback of your own: stop when the loss is low enough, and keep a diary.

llamahome train data.jsonl --set 'training.callbacks=[examples.custom_callback:Diary]'
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Diary:
    """Writes a line for each evaluation and checkpoint; asks to stop once the loss is below `target`."""

    def __init__(self, path: str = "diary.txt", target: float = 0.1) -> None:
        self.path, self.target = Path(path), target

    def __call__(self, event: str, loop: Any, record: Mapping[str, Any]) -> str | None:
        if event in ("evaluate", "checkpoint"):
            with self.path.open("a") as file:
                file.write(f"{event} at step {loop.state.step}\n")
        if event == "step" and record["loss"] < self.target:
            return "stop"
        return None
