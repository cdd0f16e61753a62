"""A plan confirmed by running one step of the real code with fake tensors: no weights, no arithmetic, only sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llamahome.config import Config
from llamahome.data.batch import MicroBatch
from llamahome.memory.tracer import PeakTracker
from llamahome.model.adapters import apply_adapter, enable_checkpointing, without_input_casts
from llamahome.model.attention import NAME, register
from llamahome.model.fuse import fuse
from llamahome.training.objective import Objective, decode, flat_row
from llamahome.training.optim import build_optimizer
from llamahome.training.precision import Precision

_LAYERS = (1, 2, 3)


def traced_bytes(
    architecture: Mapping[str, Any], config: Config, precision: Precision, *, tokens: int,
    checkpointing: bool | int = False,
) -> int:  # fmt: skip
    """Peak bytes of the tensors of a training step with `tokens` in one micro-batch, weights and optimizer included.

    Models of 1, 2 and 3 layers run and the rest is extrapolated: each layer costs the same, or where only the first are
    computed again, each of its kind. The process itself, the
    allocator's share and the buffers of the loss are not in it. Takes seconds for a model of any size; the second step
    is measured, when the optimizer's state is there. Raises: RuntimeError where the three do not lie on a line.
    """
    layers = next(int(architecture[name]) for name in ("num_hidden_layers", "n_layer") if name in architecture)
    again = layers if checkpointing is True else min(layers, int(checkpointing))
    trace = partial(_line, architecture, config, precision, tokens)
    rest, kept = trace(again == layers)
    # In front of layers that keep all, those computed again add what they add to a model that has no others.
    inputs = trace(True)[1] if 0 < again < layers else kept
    return rest + (layers - again) * kept + again * inputs


def _line(
    architecture: Mapping[str, Any], config: Config, precision: Precision, tokens: int, checkpointing: bool
) -> tuple[int, int]:
    """Bytes of the rest of a model and of each layer."""
    peaks = [_traced(architecture, number, config, precision, tokens, checkpointing) for number in _LAYERS]
    first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
    if abs(first - second) > 0.02 * peaks[2]:
        raise RuntimeError(f"layers do not cost the same: {first} and {second} bytes")
    return peaks[2] - _LAYERS[-1] * second, second


def _traced(
    architecture: Mapping[str, Any], layers: int, config: Config, precision: Precision, tokens: int, checkpointing: bool
) -> int:
    model = _on_meta(architecture, layers, config, precision)
    if checkpointing:
        enable_checkpointing(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, PeakTracker() as tracker:
        _make_fake(model, mode)
        tracker.count([*model.parameters(), *model.buffers()])
        causal = Objective(model.train()).causal
        optimizer = build_optimizer(model, config.optimization)
        batch = flat_row([[1] * tokens])
        for _ in range(2):
            tracker.peak_bytes = tracker.live_bytes
            for _ in range(2):  # the second micro-batch meets the gradients of the first
                _run(model, causal, batch, precision)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return int(tracker.peak_bytes)


def _run(model: Any, causal: Any, batch: MicroBatch, precision: Precision) -> None:
    with without_input_casts(model, precision.lowers), precision.autocast():
        hidden = decode(causal, batch)
        # In place of the loss, whose own code looks at values: it keeps one gradient of this size.
        (hidden * hidden.detach()).sum().backward()  # type: ignore[no-untyped-call]


def _on_meta(architecture: Mapping[str, Any], layers: int, config: Config, precision: Precision) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    few = {name: layers for name in ("num_hidden_layers", "n_layer") if name in architecture}
    lists = {"layer_types": architecture["layer_types"][:layers]} if architecture.get("layer_types") else {}
    settings = {**architecture, **few, **lists, "attn_implementation": NAME}
    kind = AutoConfig.for_model(settings.pop("model_type"), **settings)
    dtype = torch.float32 if config.trains_base else precision.frozen
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind, dtype=dtype, attn_implementation=NAME)
        model = apply_adapter(model, config)
    if config.processing.fuse:
        fuse(model)
    return model


def _make_fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors of a CPU in place of the meta ones; `Module.to` cannot do it. Fake CUDA tensors would abort."""
    known: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    parameter = isinstance(tensor, torch.nn.Parameter)
                    known[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if parameter else fake
                tensors[name] = known[id(tensor)]  # type: ignore[assignment]
