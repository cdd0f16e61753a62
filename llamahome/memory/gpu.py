"""What only a GPU's memory needs."""

from __future__ import annotations

import torch


def trim_gpu_cache(device: torch.device, keep_bytes: int) -> bool:
    """Give memory that the GPU's allocator keeps unused back to others, where it is more than `keep_bytes`."""
    if device.type != "cuda":
        return False
    if torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) <= keep_bytes:
        return False
    torch.cuda.empty_cache()
    return True
