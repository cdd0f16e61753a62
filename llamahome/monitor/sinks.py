"""Where records and events go: metrics.jsonl always, TensorBoard and others by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llamahome.files import storage_errors, write_atomic
from llamahome.monitor.metrics import plain
from llamahome.plugins import load_object

logger = logging.getLogger(__name__)


class MetricSink(Protocol):
    """Receives every step's record and every event of a run."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object per line, written at once. Raises: StorageError when the disk does not take it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path):
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({key: plain(value) for key, value in record.items()}, allow_nan=False)
        with storage_errors(self.path):
            self._file.write(line + "\n")

    def event(self, event: Mapping[str, Any]) -> None:
        self.write(event)

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def truncate_after(path: Path, step: int) -> None:
        """Drop the records of steps beyond `step`, and a torn last line: a resumed run writes them again."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and (record.get("step") or 0) <= step:
                kept.append(line + "\n")
        write_atomic(path, "".join(kept))


class TensorBoardSink:
    """The numbers of each record as scalars. A failing disk is said once and never stops the run."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))
        self._failed = False

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            for key, value in record.items():
                if isinstance(value, int | float) and key != "step":
                    self._writer.add_scalar(key, value, record["step"])
        except Exception as error:  # the writer thread hands over whatever stopped it
            if not self._failed:
                logger.warning("TensorBoard: %s; the run goes on without it", error)
            self._failed = True

    def event(self, event: Mapping[str, Any]) -> None:
        if "eval_loss" in event:
            self.write(event)

    def close(self) -> None:
        try:
            self._writer.close()
        except Exception as error:
            logger.warning("TensorBoard: %s", error)


def build_sinks(names: Iterable[str], folder: Path) -> list[MetricSink]:
    """`metrics.jsonl`, and what `monitor.sinks` names: tensorboard, or `module:object` called with the run's folder.

    Raises: ConfigError for an unknown name. A TensorBoard that is not installed is one warning.
    """
    sinks: list[MetricSink] = [JsonlSink(folder / "metrics.jsonl")]
    for name in names:
        if name == "none":
            continue
        build = load_object(name, key="monitor.sinks", known={"tensorboard": _tensorboard})
        sink = build(folder)
        if sink is not None:
            sinks.append(sink)
    return sinks


def _tensorboard(folder: Path) -> MetricSink | None:
    try:
        return TensorBoardSink(folder / "tensorboard")
    except ImportError:
        logger.warning('no TensorBoard: pip install "llamahome[tensorboard]", or set monitor.sinks: [none]')
        return None
