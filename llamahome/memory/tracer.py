"""Live bytes of all tensors that are made, counted as they come and go; works with fake tensors, which hold nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_LARGE = 1 << 20


class PeakTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages made while it is active, each until nothing refers to it.

    `live_bytes` now, `peak_bytes` at most. Sizes are rounded up to `round_to` bytes, as an allocator does.
    PyTorch's own MemTracker fails on frozen parameters (2.13), which every adapter stands on.

    resizing: storages may change their sizes, as FSDP2's do, which frees and fills them in place. All are then summed
    anew after each operator with a result of a mebibyte or more.
    """

    def __init__(self, round_to: int = 512, *, resizing: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._round_to = round_to
        self._resizing = resizing
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def count(self, tensors: Iterable[object]) -> None:
        """Count the storages of `tensors`, each once; what is no tensor is passed over."""
        storages = [storage for tensor in tensors if isinstance(tensor, torch.Tensor) for storage in _storages(tensor)]
        if not self._resizing:
            for storage in storages:
                self._add(storage)
            return
        for storage in storages:
            self._known.setdefault(storage, 0)
        if any(storage.nbytes() >= _LARGE for storage in storages):
            self._sum_anew()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def take_peak(self) -> int:
        """The peak since the last call; the next one begins with what lives now."""
        peak = self.peak_bytes
        if self._resizing:
            self._sum_anew()
        self.peak_bytes = self.live_bytes
        return peak

    def _sum_anew(self) -> None:
        self.live_bytes = sum(self._rounded(storage) for storage in list(self._known))

    def _rounded(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._round_to) * self._round_to

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = self._rounded(storage)
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


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages behind a tensor; of one that wraps others, such as a part of a shared weight, theirs."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        yield tensor.untyped_storage()
        return
    for name in wrapper.__tensor_flatten__()[0]:
        if isinstance(inner := getattr(wrapper, name), torch.Tensor):
            yield from _storages(inner)
