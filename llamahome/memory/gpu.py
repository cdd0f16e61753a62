"""What only a GPU's memory needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def trim_gpu_cache(device: torch.device, keep_bytes: int) -> bool:
    """Give memory that the GPU's allocator keeps unused back to others, where it is more than `keep_bytes`."""
    if device.type != "cuda":
        return False
    if torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) <= keep_bytes:
        return False
    torch.cuda.empty_cache()
    return True


def saving_in_host_memory(active: bool, device: str = "cuda") -> AbstractContextManager[object]:
    """While `active`, what forward keeps for backward lies in the host's memory and comes back when it is wanted.

    Rounding does not change. Each byte crosses the bus twice (`torch.autograd.graph.save_on_cpu`).
    """
    if not active:
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=device.partition(":")[0] == "cuda")
