"""Cross-entropy of logits in bf16 on processors with AVX512-BF16, by `csrc/cross_entropy_bf16.cpp`.

Three passes over a row in the caches, where PyTorch's operations take a dozen over fp32 copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamahome import _C


def fits_native(z: Tensor) -> bool:
    return _C.has_avx512_bf16() and z.dtype == torch.bfloat16 and z.device.type == "cpu" and z.is_contiguous()


def native_cross_entropy(z: Tensor, labels: Tensor, factor: float, *, gradient: bool) -> Tensor:
    """The loss of each row of z [rows, V], fp32; `factor` by its gradient replaces z if wanted.

    Raises: RuntimeError for a label that is no column of z.
    """
    losses = z.new_empty(z.shape[0], dtype=torch.float32)
    bits = z.detach().view(torch.uint16).numpy()
    targets = labels.to(torch.int64).contiguous().numpy()
    _C.cross_entropy(bits, targets, factor, gradient, torch.get_num_threads(), losses.numpy())
    return losses
