"""Where a run's records and events are written: metrics.jsonl always, TensorBoard and the user's own on request."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from llamahome.errors import ConfigError, MissingError
from llamahome.files import storage_errors, write_atomic
from llamahome.monitor.trackers import TRACKERS, build_tracker, scalars
from llamahome.plugins import load_object, name_of

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"


class MetricSink(Protocol):
    """Takes the records of steps and the events of a run, as flat mappings of plain values."""

    def write(self, record: Mapping[str, Any], /) -> None: ...
    def event(self, event: Mapping[str, Any], /) -> None: ...
    def close(self) -> None: ...


class JsonlSink:
    """Appends one JSON object per line; what is not a finite number is null.

    A line is in the file whole or not at all: after a failed write (a full disk) the file ends where it did before,
    and the loss is said once. Raises: StorageError when the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if _is_torn(path):
            os.write(self._file, b"\n")

    def write(self, record: Mapping[str, Any], /) -> None:
        line = json.dumps(plain(record)).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        else:
            reason = "no space left"
        if written < len(line):
            if written:  # else nothing is to be cut, and a disk that has become read-only would refuse it
                os.ftruncate(self._file, size)
            if not self._warned:
                logger.warning("cannot write %s: %s; records are lost until there is space", self.path, reason)
                self._warned = True

    def event(self, event: Mapping[str, Any], /) -> None:
        self.write(event)

    def sync(self) -> None:
        """What was written is on disk afterwards, as far as the disk allows it."""
        try:
            os.fsync(self._file)
        except OSError as error:
            logger.warning("%s may not be on disk: %s", self.path, error.strerror or error)

    def go_back(self, step: int) -> None:
        """Drop what came after `step`. Raises: StorageError."""
        self.truncate_after(self.path, step)
        with storage_errors(self.path):
            renewed = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            os.dup2(renewed, self._file, inheritable=False)
            os.close(renewed)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @staticmethod
    def truncate_after(path: Path, step: int) -> None:
        """Drop all that came after `step`, before a run goes on from there; also a last line that was cut short.

        Lines without a step (events of the run as a whole) stay if they came before the first one that is dropped.
        Does nothing where there is no file. Raises: StorageError.
        """
        if not path.exists():
            return
        with storage_errors(path):
            lines = path.read_bytes().splitlines(keepends=True)
        kept = b"".join(_until(lines, step))
        if kept != b"".join(lines):
            write_atomic(path, kept)


class TensorBoardSink:
    """Scalars for TensorBoard, written at once and without a thread, in a file of its own per run or resume.

    A write that fails (a full disk) is said once, then the sink is silent; training goes on.
    Raises: MissingError without the package `tensorboard`, StorageError when the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
            from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        except ImportError as error:
            fix = 'pip install "llamahome[tensorboard]", or set monitor.sinks: []'
            raise MissingError("TensorBoard is not installed", where="monitor.sinks", fix=fix) from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        path = folder / f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        with storage_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        self._writer: Any = RecordWriter(self._file)
        self._add(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, record: Mapping[str, Any], /) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()]
        self._add(self._event(wall_time=time.time(), step=int(record["step"]), summary=self._summary(value=values)))

    def event(self, event: Mapping[str, Any], /) -> None:
        """Events are not scalars; an evaluation's figures are."""
        if event.get("event") == "evaluation" and "step" in event:
            self.write({name: value for name, value in event.items() if name != "event"})

    def close(self) -> None:
        self._writer = None
        try:
            self._file.close()
        except OSError as error:
            logger.debug("closing the TensorBoard file: %s", error)

    def _add(self, event: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            logger.warning("TensorBoard is not written any more: %s", error.strerror or error)
            self.close()


class GuardedSink:
    """A sink of the user's own: its first exception is said once and ends its use, not the run."""

    def __init__(self, sink: MetricSink, name: str) -> None:
        self._sink: MetricSink | None = sink
        self.name = name

    def write(self, record: Mapping[str, Any], /) -> None:
        self._call("write", dict(record))

    def event(self, event: Mapping[str, Any], /) -> None:
        self._call("event", dict(event))

    def close(self) -> None:
        self._call("close")
        self._sink = None

    def _call(self, method: str, *arguments: Any) -> None:
        if self._sink is None:
            return
        try:
            getattr(self._sink, method)(*arguments)
        except Exception as error:  # the user's code may raise anything
            logger.warning("sink %s is not used any more: %s: %s", self.name, type(error).__name__, error)
            self._sink = None


def build_sinks(
    names: Iterable[str | MetricSink], folder: Path, settings: Mapping[str, Any] | None = None
) -> list[MetricSink]:
    """`folder`/metrics.jsonl, and a sink for each name: "tensorboard", a tracker's, "none", or `module:object`.

    The object is called with the run's folder and returns a MetricSink; one that is there already is used as it is.
    `settings` are what a tracker shows as the run's configuration. TensorBoard that is not installed is a warning.
    Raises: ConfigError, StorageError, MissingError for a tracker that is not installed.
    """
    sinks: list[MetricSink] = [JsonlSink(folder / METRICS_FILE)]
    for name in names:
        if name == "none":
            continue
        if name == "tensorboard":
            sinks += _tensorboard(folder / "tensorboard")
        elif not isinstance(name, str):
            sinks.append(GuardedSink(name, name_of(name)))
        else:
            sinks.append(GuardedSink(_named_sink(name, folder, settings or {}), name))
    return sinks


def _tensorboard(folder: Path) -> list[MetricSink]:
    try:
        return [TensorBoardSink(folder)]
    except MissingError as error:
        logger.warning("%s", error)
        return []


def _named_sink(name: str, folder: Path, settings: Mapping[str, Any]) -> MetricSink:
    """A tracker's sink or one of the user's own. Raises: ConfigError, MissingError."""
    known = {tracker: partial(build_tracker, tracker, settings=settings) for tracker in TRACKERS}
    factory = load_object(name, key="monitor.sinks", known={"none": None, "tensorboard": None, **known})
    try:
        sink: MetricSink = factory(folder)
    except (MissingError, MemoryError):
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{name!r} failed: {type(error).__name__}: {error}", where="monitor.sinks",
                          fix="give an object that takes the run's folder") from error  # fmt: skip
    return sink


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite are None, unknown objects their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode(errors="replace").decode()  # halves of characters are no valid JSON
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # a scalar of numpy or torch
        return plain(value.item())
    return str(value)


def _is_torn(path: Path) -> bool:
    """Whether the file's last line has no end."""
    with storage_errors(path), path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _until(lines: list[bytes], step: int) -> Iterator[bytes]:
    dropping = False
    for line in lines:
        try:
            found = json.loads(line).get("step") if line.endswith(b"\n") else step + 1
        except (ValueError, AttributeError):
            continue
        later = isinstance(found, int | float) and found > step
        dropping = dropping or later
        if not later and (found is not None or not dropping):
            yield line
