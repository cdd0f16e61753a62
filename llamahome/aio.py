"""Training from an event loop: one worker thread owns all torch work, coroutines receive its records.

    async with Worker() as worker:
        data = await worker.load_data("data.jsonl", tokenizer)
        metrics = await worker.train_epoch(loop)
        async for record in worker.train(config):
            print(record["loss"])

The core is synchronous, and stays so: gradient mode and autocast belong to a thread, and an `await` inside them would
leak them to other tasks. So nothing here awaits while torch works; records cross over through a bounded queue, and a
consumer that is slow makes training wait. Works in a running loop, such as a notebook's.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeAlias, TypeVar

from llamahome.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from llamahome.config import Config
    from llamahome.data.manager import Datasets
    from llamahome.data.recipe import Data
    from llamahome.monitor.metrics import StepRecord
    from llamahome.training.extensions import Extensions
    from llamahome.training.loop import TrainingLoop

T = TypeVar("T")
P = ParamSpec("P")
Save: TypeAlias = "Callable[[TrainingLoop], object]"
_END = object()


class Worker:
    """One thread for all torch work of a program, one thing at a time.

    `buffer` records may wait to be read before training waits for the reader.
    """

    def __init__(self, *, buffer: int = 8) -> None:
        if buffer < 1:
            raise ValueError(f"buffer {buffer} is below 1")
        self._buffer = buffer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llamahome", initializer=_same_threads())
        self._training = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._pool.shutdown)

    async def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(*args, **kwargs)` on the worker's thread, after what it does now; a cancelled call is waited for."""
        return await _finished(self._pool.submit(work, *args, **kwargs))

    async def load_data(
        self, data: Data, tokenizer: Any, config: Config | None = None, *, eval_data: Data | None = None
    ) -> Datasets:
        """Prepare (or find) the tokens of `data`. Raises: as `DataManager.load`."""
        from llamahome.data.manager import DataManager

        return await self.call(DataManager(tokenizer, config).load, data, eval_data)

    async def train_epoch(self, loop: TrainingLoop, *, save: Save | None = None) -> dict[str, float]:
        """The rest of the epoch that `loop` is in: mean loss over its trained tokens, and sums.

        Gives `loss`, `steps`, `tokens`, `trained_tokens` and `seconds`. Cancelled: as `steps`.
        """
        per_epoch = loop.batches.order.steps_per_epoch
        sums = dict.fromkeys(("loss", "steps", "tokens", "trained_tokens", "seconds"), 0.0)
        async with aclosing(self.steps(loop, per_epoch - loop.state.step % per_epoch, save=save)) as records:
            async for record in records:
                sums["loss"] += record["loss"] * record["trained_tokens"]
                sums["steps"] += 1
                sums["tokens"] += record["tokens"]
                sums["trained_tokens"] += record["trained_tokens"]
                sums["seconds"] += record["step_seconds"]
        sums["loss"] /= sums["trained_tokens"] or 1
        return sums

    async def steps(
        self, loop: TrainingLoop, count: int | None = None, *, save: Save | None = None
    ) -> AsyncGenerator[StepRecord, None]:
        """The records of the next `count` steps of `loop` (of all that are left), as they are made.

        Cancelled or closed early, it finishes the step under way, calls `save` with the loop (see `checkpoint_in`),
        and then ends. Raises: UsageError while another training of this worker goes on; what the loop raises.
        """

        def work(stream: _Stream[StepRecord]) -> None:
            for record in islice(loop, count):
                stream.put(record)
                if stream.stopped:
                    break
            if stream.stopped and save is not None:
                save(loop)

        async with aclosing(self._stream(work)) as records:
            async for record in records:
                yield record

    async def train(self, config: Config, own: Extensions | None = None) -> AsyncGenerator[StepRecord, None]:
        """The records of a whole run, what `llamahome.train` does. Cancelled or closed early, the run saves and stops.

        Raises: as `llamahome.train`; UsageError while another training of this worker goes on.
        """
        from dataclasses import replace

        from llamahome.training.extensions import Extensions
        from llamahome.training.run import train
        from llamahome.training.signals import StopSignal

        signals, given = StopSignal(), own or Extensions()

        def work(stream: _Stream[StepRecord]) -> None:
            stream.on_stop = lambda: setattr(signals, "stop", signal.SIGINT)
            if stream.stopped:
                return
            try:
                train(config, replace(given, sinks=[*given.sinks, _RecordSink(stream)]), signals=signals)
            except Interrupted:
                if not stream.stopped:
                    raise

        async with aclosing(self._stream(work)) as records:
            async for record in records:
                yield record

    async def _stream(self, work: Callable[[_Stream[StepRecord]], None]) -> AsyncGenerator[StepRecord, None]:
        if self._training:
            raise UsageError("this worker trains already", fix="wait for the epoch's end, or cancel it")
        self._training = True
        stream = _Stream[Any](self._buffer)
        job = self._pool.submit(work, stream)
        job.add_done_callback(lambda _: stream.end())
        try:
            while (record := await stream.get()) is not _END:
                yield record
        finally:
            stream.stop()
            try:
                await _finished(job)
            finally:
                self._training = False


class _Stream(Generic[T]):
    """Records from the worker's thread to one coroutine, at most `size` of them unread."""

    def __init__(self, size: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._free = threading.Semaphore(size)
        self.stopped = False
        self.on_stop: Callable[[], None] = lambda: None

    def put(self, record: T) -> None:
        """From the worker's thread; waits for room unless nobody reads any more."""
        if not self.stopped:
            self._free.acquire()
            self._loop.call_soon_threadsafe(self._queue.put_nowait, record)

    def end(self) -> None:
        """From the worker's thread: nothing more will come."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, _END)

    async def get(self) -> Any:
        record = await self._queue.get()
        self._free.release()
        return record

    def stop(self) -> None:
        """From the event loop: nobody reads any more."""
        self.stopped = True
        self.on_stop()
        self._free.release()  # the one `put` that may wait


class _RecordSink:
    """Steps' records into a stream."""

    def __init__(self, stream: _Stream[StepRecord]) -> None:
        self._stream = stream

    def write(self, record: Any, /) -> None:
        self._stream.put(dict(record))

    def event(self, event: Any, /) -> None:
        """Events stay in metrics.jsonl."""

    def close(self) -> None:
        """The stream ends with the run."""


async def _finished(job: Future[T]) -> T:
    """The job's result; a cancellation that comes meanwhile is raised when the job has ended."""
    waiting = asyncio.wrap_future(job)
    cancelled = None
    while not job.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError as error:
            cancelled = error
            if job.cancel():  # it had not begun
                break
    if cancelled is not None:
        raise cancelled from (None if job.cancelled() else job.exception())
    return await waiting


def checkpoint_in(folder: Path, tokenizer: Any) -> Save:
    """A `save` that writes `folder`/checkpoint-N; its call raises StorageError."""

    def save(loop: TrainingLoop) -> Path:
        from llamahome.training.checkpoint import save_checkpoint

        return save_checkpoint(
            folder, loop.state, loop.model, tokenizer, loop.optimizer, loop.scheduler, loop.scaler
        )  # fmt: skip

    return save


def _same_threads() -> Callable[[], None]:
    """Torch's number of threads belongs to the thread that set it: the worker takes over that of its maker."""
    import torch

    count = torch.get_num_threads()
    return lambda: torch.set_num_threads(count)
