"""torch.compile, layer by layer: the repeated decoder layer is compiled once, in seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from llamahome.kernels import lora
from llamahome.memory.oom import is_oom

logger = logging.getLogger(__name__)
Mode = Literal["none", "auto", "default", "reduce-overhead", "max-autotune"]

# On two CPU cores with nothing cached, and what it saves of a step at least where it helps (10 to 20 % were measured).
_COMPILE_SECONDS = 30.0
_LEAST_GAIN = 0.1
_SHORT_RUN = 50_000  # tokens; not worth a trial
_TRIAL_TOKENS = 512

Trial = Callable[[int], None]


def compile_layers(causal: Any, mode: Mode, *, tokens: int, trial: Trial) -> str:
    """Compile every decoder layer of a transformers model in place; returns the mode that is in force.

    `auto` tries a step over 512 tokens without compiling. Where the `tokens` of the whole run are so many that a tenth
    of their time would pay for compiling, it compiles, tries again, and stays with the faster. Shapes are dynamic: a
    new number of tokens compiles nothing. `trial` runs forward and backward over so many tokens: torch compiles at the
    first call, and a compiler that fails there costs a warning, not the run.
    """
    if mode == "none":
        return mode
    if mode == "auto":
        return _choose(causal, tokens, trial)
    if mode == "reduce-overhead" and not torch.cuda.is_available():
        logger.info("processing.compile_mode: reduce-overhead is for GPUs; compiling in mode default")
        mode = "default"
    return _compile(causal, mode, trial)


def _choose(causal: Any, tokens: int, trial: Trial) -> str:
    if tokens < _SHORT_RUN or not compiler_works():
        return "none"
    plain = _seconds(trial)
    if _LEAST_GAIN * plain * tokens / _TRIAL_TOKENS < _COMPILE_SECONDS or _compile(causal, "default", trial) == "none":
        return "none"
    compiled = _seconds(trial)
    logger.info("%d tokens take %.2f s, %.2f s compiled", _TRIAL_TOKENS, plain, compiled)
    if compiled < plain:
        return "default"
    _undo(causal)
    return "none"


def _seconds(trial: Trial) -> float:
    """The better of two runs after a first one."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        trial(_TRIAL_TOKENS)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _keep_little() -> None:
    """Let the compiler save what the fused operations would: no 16-bit copies of weights, no products of fused chains.

    By default it saves whatever backward reads as it is, and what is read long after it was made. Operators that are
    none of torch's own cheap ones (products, attention) are still never computed twice.
    """
    from torch._functorch import config

    config.ban_recompute_materialized_backward = False
    config.ban_recompute_used_far_apart = False


def _compile(causal: Any, mode: str, trial: Trial) -> str:
    _keep_little()
    # The first layer would be compiled a second time for an input without gradient.
    causal.enable_input_require_grads()
    for function in lora.TRACED_BY_RUNNING:
        torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]
    for layer in decoder_layers(causal):
        layer.compile(dynamic=True, mode=None if mode == "default" else mode)
    try:
        trial(8)
    except Exception as error:  # dynamo, inductor and the C++ compiler each raise their own kinds
        if is_oom(error):
            raise
        logger.warning(
            "compiling failed, the run goes on without: %s",
            (str(error).strip().splitlines() or [type(error).__name__])[0],
        )
        _undo(causal)
        return "none"
    return mode


def _undo(causal: Any) -> None:
    causal.disable_input_require_grads()
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
