"""torch.compile, layer by layer: the repeated decoder layer is compiled once, in seconds."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

logger = logging.getLogger(__name__)
Mode = Literal["none", "auto", "default", "reduce-overhead", "max-autotune"]

# Compiling costs about 15 s on two CPU cores when nothing is cached; a shorter run does not earn it back.
_WORTH_TOKENS = 500_000


def compile_layers(causal: Any, mode: Mode, *, tokens: int) -> str:
    """Compile every decoder layer of a transformers model in place; returns the mode that is in force.

    `auto` compiles when the run has at least half a million tokens and a compiler is there. Shapes are dynamic: a
    new number of tokens compiles nothing.
    """
    if mode == "auto":
        mode = "default" if tokens >= _WORTH_TOKENS and compiler_works() else "none"
    if mode == "none":
        return mode
    if mode == "reduce-overhead" and not torch.cuda.is_available():
        logger.info("processing.compile_mode: reduce-overhead is for GPUs; compiling in mode default")
        mode = "default"
    # The first layer would be compiled a second time for an input without gradient.
    causal.enable_input_require_grads()
    for layer in decoder_layers(causal):
        layer.compile(dynamic=True, mode=None if mode == "default" else mode)
    return mode


def uncompile_layers(causal: Any) -> None:
    """Back to eager execution, after compiling failed."""
    for layer in decoder_layers(causal):
        layer._compiled_call_impl = None


def decoder_layers(causal: Any) -> list[nn.Module]:
    """The repeated layers of a transformers decoder."""
    layers = getattr(causal.base_model, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def compiler_works() -> bool:
    """Whether inductor finds a compiler for this machine."""
    if torch.cuda.is_available():
        return True
    from torch._inductor import cpp_builder

    try:
        return bool(cpp_builder.get_cpp_compiler())
    except Exception:  # raises its own kinds when there is none
        return False
