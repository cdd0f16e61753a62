"""Live bytes of all tensors that are made, counted as they come and go; works with fake tensors, which hold nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages made while it is active, each until nothing refers to it.

    `live_bytes` now, `peak_bytes` at most. Sizes are rounded up to `round_to` bytes, as an allocator does.
    PyTorch's own MemTracker fails on frozen parameters (2.13), which every adapter stands on.
    """

    def __init__(self, round_to: int = 512) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._round_to = round_to
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def count(self, tensors: Iterable[object]) -> None:
        """Count the storages of `tensors`, each once; what is no tensor is passed over."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = -(-storage.nbytes() // self._round_to) * self._round_to
        self._known[storage] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live_bytes -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        self.count(tree_leaves(result))
        return result
