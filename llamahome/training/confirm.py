"""A plan confirmed by running one step of the real code with fake tensors: no weights, no arithmetic, only sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llamahome.config import Config
from llamahome.distributed.shard import build_mesh
from llamahome.memory.tracer import PeakTracker
from llamahome.model.adapters import apply_adapter, enable_checkpointing, without_input_casts
from llamahome.model.attention import NAME, register
from llamahome.model.compile import decoder_layers
from llamahome.model.fuse import fuse
from llamahome.training.objective import Objective, decode, flat_row
from llamahome.training.optim import build_optimizer
from llamahome.training.parallel import share_model
from llamahome.training.precision import Precision

_LAYERS = (3, 4, 5)


def traced_bytes(
    architecture: Mapping[str, Any], config: Config, precision: Precision, *, tokens: int,
    checkpointing: bool | int = False, recompute_mlp: bool = False, ranks: int = 1, replicas: int = 1,
) -> int:  # fmt: skip
    """Peak bytes of the tensors of a training step with `tokens` in one micro-batch, weights and optimizer included.

    Models of three small numbers of layers run and the rest is extrapolated: each layer costs the same, or where only
    the first are computed again, each of its kind. The process itself, the allocator's share and the buffers of the
    loss are not in it. Takes seconds for a model of any size; the second step is measured, when the optimizer's state
    is there.

    ranks: processes that share a model (FSDP2), `replicas` groups of them; the bytes are those of the first rank. The
    others are only pretended, so the process must not be one of several itself.
    Raises: RuntimeError where the three do not lie on a line.
    """
    layers = next(int(architecture[name]) for name in ("num_hidden_layers", "n_layer") if name in architecture)
    again = layers if checkpointing is True else min(layers, int(checkpointing))
    trace = partial(_lines, architecture, config, precision, tokens, (ranks, replicas), recompute_mlp)
    found = trace(again == layers)
    # In front of layers that keep all, those computed again add what they add to a model that has no others.
    parts = zip(found, trace(True) if 0 < again < layers else found, strict=True)
    return max(rest + (layers - again) * kept + again * inputs for (rest, kept), (_, inputs) in parts)


def _lines(
    architecture: Mapping[str, Any], config: Config, precision: Precision, tokens: int, shared: tuple[int, int],
    recompute_mlp: bool, checkpointing: bool,
) -> list[tuple[int, int]]:  # fmt: skip
    """Bytes of the rest of a model and of each layer, while layers run and while none does."""
    traced = []
    for number in _LAYERS:
        model = _on_meta(architecture, number, config, precision, recompute_mlp)
        if checkpointing:
            enable_checkpointing(model)
        traced.append(_traced(model, config, precision, tokens, shared))
    found = []
    for peaks in zip(*traced, strict=True):
        first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
        if abs(first - second) > 0.02 * peaks[2]:
            raise RuntimeError(f"layers do not cost the same: {first} and {second} bytes")
        found.append((peaks[2] - _LAYERS[-1] * second, second))
    return found


def _traced(model: Any, config: Config, precision: Precision, tokens: int, shared: tuple[int, int]) -> tuple[int, int]:
    """Peaks of a second step of two micro-batches: from the first layer's input to its gradient, and at other times."""
    fake, tracker = FakeTensorMode(allow_non_fake_inputs=True), PeakTracker(resizing=shared[0] > 1)
    with _pretended(*shared) as mesh, fake as mode, tracker:
        _make_fake(model, mode)
        objective = Objective(model.train())
        causal = objective.causal
        enter = objective.enter if mesh is None else share_model(causal, mesh, config, precision)
        tracker.count([*model.parameters(), *model.buffers()])
        optimizer = build_optimizer(model, config.optimization)
        batch, peaks = flat_row([[1] * tokens]), _Peaks(tracker)
        decoder_layers(causal)[0].register_forward_pre_hook(peaks.enter_layers)
        for _ in range(2):
            peaks.restart()
            for _ in range(2):  # the second micro-batch meets the gradients of the first
                _run(model, partial(enter, decode, causal, batch), precision)
                peaks.leave_layers()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peaks.leave_layers()
        return peaks.within, peaks.outside


class _Peaks:
    """Peak bytes within and outside of the layers' passes: which one is higher may depend on the number of layers."""

    def __init__(self, tracker: PeakTracker) -> None:
        self._tracker = tracker
        self.restart()

    def restart(self) -> None:
        self._tracker.take_peak()
        self.within = self.outside = 0
        self._inside = False

    def enter_layers(self, _: Any, arguments: tuple[Any, ...]) -> None:
        """Hook of the first layer; its input's gradient, where there is one, is the layers' last."""
        if torch.is_grad_enabled() and not self._inside:
            self._add()
            self._inside = True
            if arguments and arguments[0].requires_grad:
                arguments[0].register_hook(lambda _: self.leave_layers())

    def leave_layers(self) -> None:
        self._add()
        self._inside = False

    def _add(self) -> None:
        peak = self._tracker.take_peak()
        if self._inside:
            self.within = max(self.within, peak)
        else:
            self.outside = max(self.outside, peak)


@contextmanager
def _pretended(ranks: int, replicas: int) -> Iterator[Any]:
    """The mesh of so many processes, of which this is the first and the others do not exist; None for a single one."""
    if ranks == 1:
        yield None
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # Its collectives return at once and move nothing.
    dist.init_process_group("fake", rank=0, world_size=ranks * replicas, store=FakeStore())
    try:
        yield build_mesh("cpu", ranks * replicas, replicas)
    finally:
        dist.destroy_process_group()


def _run(model: Any, forward: Callable[[], torch.Tensor], precision: Precision) -> None:
    with without_input_casts(model, precision.lowers), precision.autocast():
        hidden = forward()
        # In place of the loss, whose own code looks at values: it keeps one gradient of this size.
        (hidden * hidden.detach()).sum().backward()  # type: ignore[no-untyped-call]


def _on_meta(
    architecture: Mapping[str, Any], layers: int, config: Config, precision: Precision, recompute_mlp: bool
) -> Any:
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
        fuse(model, recompute_mlp=recompute_mlp)
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
