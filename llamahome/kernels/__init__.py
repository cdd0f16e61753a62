"""The face of the kernels: each operation by device and dtype.

On a GPU they are Triton kernels; on a CPU attention runs C++ of its own or ATen's flash kernel sample by sample, and
the rest is plain PyTorch. Each operation stands in `kernels/` at the top of the repository, its reference beside it,
and is installed as `llamahome.kernels.<file>`.
"""

from __future__ import annotations

from llamahome.kernels.attention import varlen_attention, varlen_attention_reference
from llamahome.kernels.loss import (
    IGNORE_INDEX,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_statistics,
)
from llamahome.kernels.mlp import gated, gated_reference
from llamahome.kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from llamahome.kernels.rope import rotate, rotate_reference

__all__ = [
    "IGNORE_INDEX",
    "add_rms_norm",
    "add_rms_norm_reference",
    "gated",
    "gated_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotate",
    "rotate_reference",
    "token_statistics",
    "varlen_attention",
    "varlen_attention_reference",
]
