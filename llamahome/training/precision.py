"""Which number formats a run uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from llamahome.config import Config
from llamahome.errors import MissingError

Name = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Name, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """`compute` is autocast's dtype; `frozen` that of weights that are not trained; trained weights are fp32."""

    name: Name
    device: str

    @property
    def compute(self) -> torch.dtype:
        return DTYPES[self.name]

    @property
    def frozen(self) -> torch.dtype:
        return DTYPES[self.name]

    @property
    def lowers(self) -> bool:
        """Whether autocast computes in less than fp32."""
        return self.name != "fp32"

    @property
    def scales_loss(self) -> bool:
        """fp16's range needs a scaled loss."""
        return self.name == "fp16"

    def autocast(self) -> AbstractContextManager[object]:
        if not self.lowers:
            return nullcontext()
        # Weights change once a step and are cast once a micro-batch at most: nothing to cache between steps.
        return torch.autocast(self.device, self.compute, cache_enabled=False)


def resolve_precision(config: Config, device: torch.device) -> Precision:
    """The format asked for, or the best that this machine computes fast.

    Raises: MissingError when the format asked for cannot run here.
    """
    asked = config.processing.precision
    if asked == "auto":
        asked = best_format(device) if config.processing.mixed_precision else "fp32"
    if asked == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise MissingError("this GPU has no bf16", where="processing.precision", fix="set processing.precision: fp16")
    return Precision(asked, device.type)


def best_format(device: torch.device) -> Name:
    """bf16 on Ampere and later and on CPUs with bf16 instructions, fp16 on older GPUs, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if fast else "fp32"
    return "fp32"
