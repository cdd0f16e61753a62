"""What a run sets in its own process before it begins: threads, the C library's allocator, the compiler's cache."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path

import torch

from llamahome.config import Config
from llamahome.data.cache import cache_folder

logger = logging.getLogger(__name__)

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT_BYTES, _USUAL_BYTES = 1 << 30, 128 << 10
_LARGE_BYTES = 32 << 20


def set_threads(config: Config, stored: int = 0) -> int:
    """Set torch's threads: the number asked for, that of the checkpoint, or one per usable core."""
    asked = config.processing.threads
    threads = asked if isinstance(asked, int) else stored or usable_cores()
    if stored and threads != stored:
        logger.warning("%d threads instead of the checkpoint's %d: equal to rounding, not to the bit", threads, stored)
    torch.set_num_threads(threads)
    return threads


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> str:
    """Let glibc keep what a step frees for the next one, but for the largest tensors; says what was set.

    By default it gives every tensor of a few MiB back to the kernel at once, and each new one is faulted in page by
    page: backward of attention over 230 tokens took twice the time. Tensors from 32 MiB, which are few, do go back: a
    heap that holds gradients of the embedding between the activations of steps of different sizes grows by a quarter.
    `llamahome.memory.oom.free_memory` still returns all of it where memory is short.
    """
    done = _set_malloc({_TRIM_THRESHOLD: _KEPT_BYTES, _MMAP_THRESHOLD: _LARGE_BYTES})
    return f"glibc, {_KEPT_BYTES >> 20} MiB kept of blocks under {_LARGE_BYTES >> 20} MiB" if done else "the system's"


def give_freed_memory_back() -> str:
    """Undo `keep_freed_memory`, and let all threads share one heap; says what was set.

    For a rank of FSDP2 on a CPU, where memory is what is short: whole layers come and go, and threads of gloo and of
    backward would each keep a heap of them. Two ranks of SmolLM2-135M with LoRA held a third more than planned.
    """
    done = _set_malloc({_TRIM_THRESHOLD: _USUAL_BYTES, _MMAP_THRESHOLD: _USUAL_BYTES, _ARENA_MAX: 1})
    return "glibc, one heap, nothing kept" if done else "the system's"


def _set_malloc(values: dict[int, int]) -> bool:
    """Whether glibc took all parameters; other C libraries have none."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return all(mallopt(name, value) for name, value in values.items())


def pages_and_nodes(system: Path = Path("/sys")) -> dict[str, str | int | None]:
    """The kernel's mode of transparent huge pages and the number of NUMA nodes; None where it does not say.

    Neither is changed; in mode `madvise` huge pages go to who asks, as the command line makes torch do. Memory lies on
    the node whose thread touches it first; a process on one node (`numactl --cpunodebind`, a cgroup's cpuset)
    gets the threads of that node from `set_threads`.
    """
    try:
        modes = (system / "kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
        chosen = modes.partition("[")[2].partition("]")[0] or None
    except OSError:
        chosen = None
    nodes = sum(1 for _ in (system / "devices/system/node").glob("node[0-9]*"))
    return {"huge_pages": chosen, "numa_nodes": nodes or None}


def use_compile_cache(config: Config) -> None:
    """Keep compiled code in the cache folder, where the next run finds it; $TORCHINDUCTOR_CACHE_DIR comes first."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder(config) / "compiled"))
