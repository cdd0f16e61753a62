"""Out of memory: how to know it, how to free what can be freed, and what to do next."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from llamahome.errors import LlamaHomeError, MemoryLimitError

if TYPE_CHECKING:
    from llamahome.memory.governor import MemoryGovernor

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Libraries report a failed allocation as a plain RuntimeError. oneDNN ("a primitive") was seen to do so under a
# limit on memory; a shortage of a GPU's shared memory ("out of resource") is a kernel's fault and not meant.
_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "Cannot allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "HIP out of memory",
    "XPU out of memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "could not create a primitive",
    "could not create a memory",
    "can't start new thread",
    "std::bad_alloc",
)


def is_oom(error: BaseException) -> bool:
    """Whether `error`, or an error that it was raised from or in place of, is a lack of memory.

    Knows torch's errors on CPUs and GPUs, numpy's and Python's MemoryError, ENOMEM from the system, and threads that
    cannot start. False for interrupts and for errors of this package: those are decisions made already.
    """
    return any(_lacks_memory(link) for link in _chain(error)) and not _is_decided(error)


def free_memory() -> None:
    """Give back what nothing refers to: garbage cycles, the GPU allocator's cache, the C library's free pages."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _trim_heap()(0)


def twice(work: Callable[[], T]) -> T:
    """What `work` gives; after an out-of-memory all that can be is freed and it runs once more. For what is atomic."""
    try:
        return work()
    except Exception as error:
        if not is_oom(error):
            raise
    free_memory()
    return work()


class OOMHandler:
    """Decides what follows an out-of-memory error in a step: the same samples in a smaller cut, or the end.

    For any loop; drop the step's gradients before the retry:

        while True:
            try:
                train(samples, governor.token_budget)
                break
            except Exception as error:
                failure = error
            for event in handler.handle(failure, micro_batch_tokens=tokens, step=step):
                log(event)

    `count` is the number of errors handled. Handling one outside of the `except` block frees more: the block keeps
    the failed call's tensors alive.
    """

    def __init__(self, governor: MemoryGovernor) -> None:
        self.governor = governor
        self.count = 0
        self._retried_step: int | None = None

    def handle(self, error: BaseException, *, micro_batch_tokens: int, step: int | None = None) -> list[dict[str, Any]]:
        """Free memory and make the cut smaller; returns the events to record. The caller then runs the step again.

        `micro_batch_tokens` are those of the micro-batch that failed, or of the step's largest. At the smallest cut
        a step is tried once more as it is, since memory was freed.

        Raises: `error` itself when it is no lack of memory; MemoryLimitError when a smaller cut does not exist.
        """
        if not is_oom(error):
            raise error
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        _drop_frames(error)
        free_memory()
        self.count += 1
        events = [{"event": "oom", "step": step, "tokens": micro_batch_tokens, "error": text, "count": self.count}]
        try:
            events.append({"step": step, **self.governor.on_oom(micro_batch_tokens)})
        except MemoryLimitError as limit:
            if self._retried_step == (step or 0):
                limit.what += f" ({text})"
                raise limit from error
            self._retried_step = step or 0
        logger.warning("out of memory with %d tokens in a micro-batch: trying again with at most %d",
                       micro_batch_tokens, self.governor.token_budget)  # fmt: skip
        return events


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that led to it, each once; `raise ... from None` hides what was before."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        link = todo.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, BaseExceptionGroup):
            todo.extend(link.exceptions)
        before = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
        if before is not None:
            todo.append(before)


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def _is_decided(error: BaseException) -> bool:
    return isinstance(error, LlamaHomeError) or not isinstance(error, Exception)


def _drop_frames(error: BaseException) -> None:
    """Let go of the tensors that the failed calls hold; where they happened is still in the traceback."""
    for link in _chain(error):
        traceback.clear_frames(link.__traceback__)


@cache
def _trim_heap() -> Callable[[int], int]:
    """glibc keeps freed memory for itself unless it is asked; other C libraries have no such function."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda pad: 0
    return trim
