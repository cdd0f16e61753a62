"""torch.compile, layer by layer: the repeated decoder layer is compiled once, in seconds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from llamahome.memory.oom import is_oom

logger = logging.getLogger(__name__)
Mode = Literal["none", "auto", "default", "reduce-overhead", "max-autotune"]

# Compiling costs about 15 s on two CPU cores when nothing is cached; a shorter run does not earn it back.
_WORTH_TOKENS = 500_000


def compile_layers(causal: Any, mode: Mode, *, tokens: int, trial: Callable[[], None]) -> str:
    """Compile every decoder layer of a transformers model in place; returns the mode that is in force.

    `auto` compiles when the run has at least half a million tokens and a compiler is there. Shapes are dynamic: a
    new number of tokens compiles nothing. `trial` runs the model forward and backward once: torch compiles at the
    first call, and a compiler that fails there costs a warning, not the run.
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
    layers = decoder_layers(causal)
    for layer in layers:
        layer.compile(dynamic=True, mode=None if mode == "default" else mode)
    try:
        trial()
    except Exception as error:  # dynamo, inductor and the C++ compiler each raise their own kinds
        if is_oom(error):
            raise
        logger.warning(
            "compiling failed, the run goes on without: %s",
            (str(error).strip().splitlines() or [type(error).__name__])[0],
        )
        for layer in layers:
            layer._compiled_call_impl = None
        return "none"
    return mode


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
