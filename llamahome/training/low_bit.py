"""AdamW whose moments take 8 or 4 bits, or pages that leave the GPU: bitsandbytes' (arXiv 2110.02861) and torchao's."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor

from llamahome.config import OptimizationSettings
from llamahome.errors import CheckpointError, MissingError
from llamahome.memory.oom import is_oom
from llamahome.model.quiet import quiet_transformers

_EXTRAS = MappingProxyType({"bitsandbytes": "qlora", "torchao": "qat"})
_WHERE = "optimization.optimizer"
_SMALLEST = 4096  # both packages keep the moments of smaller weights in 32 bits


@dataclass(frozen=True)
class LowBit:
    """An optimizer class of a package, and the optimizer to name where it does not run."""

    package: Literal["bitsandbytes", "torchao"]
    kind: str
    instead: str

    @property
    def paged(self) -> bool:
        return self.kind.startswith("Paged")


LOW_BIT: Mapping[str, LowBit] = MappingProxyType(
    {
        "adamw_8bit": LowBit("bitsandbytes", "AdamW8bit", "adamw"),
        "paged_adamw": LowBit("bitsandbytes", "PagedAdamW32bit", "adamw"),
        "paged_adamw_8bit": LowBit("bitsandbytes", "PagedAdamW8bit", "adamw_8bit"),
        "torchao_adamw_8bit": LowBit("torchao", "AdamW8bit", "adamw"),
        "torchao_adamw_4bit": LowBit("torchao", "AdamW4bit", "adamw"),
        "torchao_adamw_fp8": LowBit("torchao", "AdamWFp8", "adamw"),
    }
)


def require_optimizer(name: object, device: torch.device) -> None:
    """Whether the optimizer runs on `device`, found by a step of one weight before anything is loaded.

    On a CPU bitsandbytes' paged optimizers have no pages and say so in a warning only, so they are refused here.
    Raises: MissingError with the reason and the optimizer to use instead.
    """
    chosen = LOW_BIT.get(name) if isinstance(name, str) else None  # else it is the user's own
    if chosen is None:
        return
    if importlib.util.find_spec(chosen.package) is None:
        raise MissingError(
            f"{name} needs the package {chosen.package}", where=_WHERE,
            fix=f'pip install "llamahome[{_EXTRAS[chosen.package]}]", or use {chosen.instead}',
        )  # fmt: skip
    if chosen.paged and device.type != "cuda":
        raise MissingError(f"{name} pages its state between a GPU and the host, and this run is on the {device.type}",
                           where=_WHERE, fix=f"use {chosen.instead}")  # fmt: skip
    weight = torch.nn.Parameter(torch.ones(_SMALLEST, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        build_low_bit(chosen, [{"params": [weight]}], OptimizationSettings()).step()
    except Exception as error:  # a library that was built for other hardware may raise anything
        if is_oom(error):
            raise
        raise MissingError(f"{name} does not run on this {device.type}: {error}", where=_WHERE,
                           fix=f"use {chosen.instead}") from error  # fmt: skip


def build_low_bit(
    chosen: LowBit, groups: Iterable[dict[str, Any]], settings: OptimizationSettings
) -> torch.optim.Optimizer:
    """The optimizer over the parameter groups. Raises: ImportError without its package."""
    with quiet_transformers():
        module = importlib.import_module(f"{chosen.package}.optim")
    optimizer: torch.optim.Optimizer = getattr(module, chosen.kind)(
        groups, lr=settings.learning_rate, betas=(settings.betas[0], settings.betas[1]), eps=settings.eps
    )
    make_state(optimizer)
    if chosen.package == "torchao" and not any(p.is_cuda for group in optimizer.param_groups for p in group["params"]):
        optimizer.step = MethodType(_plain_step, optimizer)  # type: ignore[method-assign]
    return optimizer


def _plain_step(optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
    """torchao compiles its step for each shape: 8 to 40 s for two small ones on a CPU, to save a millisecond or two."""
    with torch.compiler.set_stance("force_eager"):
        return type(optimizer).step(optimizer, closure)


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the weights of an optimizer of bitsandbytes the state that they have not; others do it in their step.

    Its kernels leave no trace of a change in a weight (`_version`) but count each weight's steps, so the counts have to
    be there before a first step in which memory may run out. And a paged state has to be there to be read into.
    """
    if not _is_of(optimizer, "bitsandbytes"):
        return
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if not optimizer.state.get(parameter):
                optimizer.init_state(group, parameter, number, position)  # type: ignore[attr-defined]


def take_apart(key: str, value: Tensor) -> dict[str, Tensor]:
    """The plain tensors of a state, by `key`, or for a quantized one of torchao by `key.part`."""
    if type(value) is Tensor or not type(value).__module__.startswith("torchao."):
        return {key: value}
    names = value.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return {f"{key}.{name}": getattr(value, name) for name in names}


def put_together(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Make the quantized states of `parameter` from the parts that `take_apart` gave. Raises: CheckpointError."""
    if not _is_of(optimizer, "torchao"):
        return
    state = optimizer.state[parameter]
    for key in {name.partition(".")[0] for name in state if "." in name}:
        like = optimizer._new_buffer(parameter, key == "exp_avg")  # type: ignore[attr-defined]
        parts = {name.partition(".")[2]: state.pop(name) for name in list(state) if name.startswith(f"{key}.")}
        expected = {name.partition(".")[2]: part for name, part in take_apart(key, like).items()}
        if {name: part.shape for name, part in parts.items()} != {name: part.shape for name, part in expected.items()}:
            raise CheckpointError(f"the parts of the optimizer's {key} do not fit", where="optimizer.safetensors",
                                  fix="resume with the run's optimization.optimizer")  # fmt: skip
        context = like.__tensor_flatten__()[1]
        state[key] = type(like).__tensor_unflatten__(parts, context, like.shape, like.stride())


def _is_of(optimizer: torch.optim.Optimizer, package: str) -> bool:
    return type(optimizer).__module__.partition(".")[0] == package
