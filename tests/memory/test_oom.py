"""Every way to run out of memory is known, nothing else is taken for it, and the handler shrinks, retries or ends."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import DataError, MemoryLimitError
from llamahome.memory.oom import OOMHandler, free_memory, is_oom, twice

REAL = """
import mmap, resource, sys, threading
import numpy, torch
from llamahome.memory.oom import is_oom
torch.set_num_threads(1)
data = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + (48 << 20), -1))
gate = threading.Event()

def many_threads():
    for _ in range(200):
        threading.Thread(target=gate.wait, daemon=True).start()

attempts = {
    "torch": lambda: torch.empty(1 << 30),
    "numpy": lambda: numpy.ones(1 << 30),
    "python": lambda: bytearray(1 << 30),
    "mmap": lambda: mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "threads": many_threads,
}
for name, attempt in attempts.items():
    try:
        attempt()
    except Exception as error:
        print(name, is_oom(error), type(error).__name__, str(error)[:60].replace("\\n", " "))
gate.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA as Linux counts it")
def test_real_failures_under_a_data_limit() -> None:
    """torch, numpy, Python, mmap and threads fail for real; RLIMIT_AS would also count mapped files."""
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=60)
    found = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()}
    assert found == dict.fromkeys(("torch", "numpy", "python", "mmap", "threads"), "True"), done.stdout + done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("unable to mmap 1000 bytes from file <model>: Cannot allocate memory (12)"),
        RuntimeError("could not create a primitive"),
        ExceptionGroup("workers", [ValueError("x"), MemoryError()]),
    ],
)
def test_lack_of_memory(error: Exception) -> None:
    assert is_oom(error)


def test_torchs_own_error() -> None:
    torch = pytest.importorskip("torch")
    assert is_oom(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def caused(outer: BaseException, inner: BaseException, *, context: bool = False, hidden: bool = False) -> BaseException:
    if context:
        outer.__context__ = inner
        outer.__suppress_context__ = hidden
    else:
        outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (caused(RuntimeError("backward failed"), MemoryError()), True),
        (caused(ValueError("while handling"), MemoryError(), context=True), True),
        (caused(RuntimeError("a"), caused(RuntimeError("b"), MemoryError())), True),
        (caused(ValueError("from None"), MemoryError(), context=True, hidden=True), False),
        (caused(KeyboardInterrupt(), MemoryError(), context=True), False),
        (caused(SystemExit(1), MemoryError(), context=True), False),
        (caused(MemoryLimitError("does not fit"), MemoryError()), False),
        (DataError("CUDA out of memory"), False),
        (ValueError("row 3: 'CUDA out of memory'"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("out of resource: shared memory, Required: 196608, Hardware limit: 166912"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_chains_and_look_alikes(error: BaseException, expected: bool) -> None:
    assert is_oom(error) is expected


def test_a_circle_of_causes_ends() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_oom(first)


class Governor:
    """Halves down to 100 tokens."""

    token_budget = 400

    def on_oom(self, tokens: int) -> dict[str, Any]:
        if self.token_budget <= 100:
            raise MemoryLimitError("100 tokens do not fit", fix="raise the limit")
        before, self.token_budget = self.token_budget, self.token_budget // 2
        return {"event": "cut_changed", "from": before, "to": self.token_budget, "reason": "out of memory"}


def test_handler_shrinks_retries_once_at_the_floor_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    handler = OOMHandler(Governor())  # type: ignore[arg-type]
    first = handler.handle(MemoryError("bytes"), micro_batch_tokens=390, step=7)
    assert first == [
        {"event": "oom", "step": 7, "tokens": 390, "error": "bytes", "count": 1},
        {"step": 7, "event": "cut_changed", "from": 400, "to": 200, "reason": "out of memory"},
    ]
    handler.handle(MemoryError(), micro_batch_tokens=200, step=7)
    assert [event["event"] for event in handler.handle(MemoryError(), micro_batch_tokens=100, step=7)] == ["oom"]
    with pytest.raises(MemoryLimitError, match=r"100 tokens do not fit \(MemoryError\)") as ended:
        handler.handle(MemoryError(), micro_batch_tokens=100, step=7)
    assert ended.value.exit_code == 5
    assert isinstance(ended.value.__cause__, MemoryError)
    assert handler.count == 4
    assert handler.handle(MemoryError(), micro_batch_tokens=100, step=8), "another step may try once again"


def test_handler_leaves_other_errors_alone() -> None:
    handler, fault = OOMHandler(Governor()), ValueError("no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no") as raised:
        handler.handle(fault, micro_batch_tokens=10)
    assert raised.value is fault
    assert handler.count == 0


class Block:
    """Stands for a large tensor."""


def test_handler_lets_go_of_what_the_failed_call_holds() -> None:
    watched: list[weakref.ref[Block]] = []

    def step() -> None:
        block = Block()
        watched.append(weakref.ref(block))
        raise MemoryError

    try:
        step()
    except MemoryError as error:
        failure = error
    assert watched[0]() is not None
    OOMHandler(Governor()).handle(failure, micro_batch_tokens=390)  # type: ignore[arg-type]
    assert watched[0]() is None


def test_free_memory_gives_pages_back() -> None:
    """Many small blocks fill the heap; freed, they go back to the system only when asked."""
    from llamahome.memory.monitor import MemoryMonitor

    monitor = MemoryMonitor()
    blocks = [bytearray(50_000) for _ in range(2000)]
    kept = [bytearray(1000) for _ in range(2000)]
    high = monitor.read().used_bytes
    del blocks
    gc.collect()
    free_memory()
    assert monitor.read().used_bytes < high - 70_000_000
    assert len(kept) == 2000


def test_what_is_atomic_runs_twice_and_no_more() -> None:
    left = [MemoryError(), None]

    def work() -> str:
        if (error := left.pop(0)) is not None:
            raise error
        return "saved"

    assert twice(work) == "saved"
    left[:] = [MemoryError(), MemoryError(), None]
    with pytest.raises(MemoryError):
        twice(work)
    left[:] = [OSError(28, "No space left"), None]  # type: ignore[list-item]
    with pytest.raises(OSError, match="No space"):
        twice(work)
    assert left == [None]


def _no_memory(*_: object, **__: object) -> None:
    raise MemoryError


def _adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    from llamahome.model.adapters import attach_adapter

    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.setattr(peft.LoraConfig, "from_pretrained", _no_memory)
    attach_adapter(None, folder)


def _tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from llamahome.model import load, source

    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", _no_memory)
    load.load_tokenizer(source.ModelSource("a model", folder, str(folder)))


def _optimizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from llamahome.config import OptimizationSettings
    from llamahome.training.optim import build_optimizer

    monkeypatch.setattr(torch.optim, "AdamW", _no_memory)
    build_optimizer(torch.nn.Linear(2, 2), OptimizationSettings())


def _small_optimizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from llamahome.training import low_bit

    monkeypatch.setattr(low_bit, "build_low_bit", _no_memory)
    low_bit.require_optimizer("torchao_adamw_8bit", torch.device("cpu"))


@pytest.mark.parametrize("load", [_adapter, _tokenizer, _optimizer, _small_optimizer])
def test_a_lack_of_memory_is_not_blamed_on_what_was_loaded(
    load: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is short of memory is tried again; a damaged file is not."""
    with pytest.raises(MemoryError):
        load(tmp_path, monkeypatch)
