"""A model whose weights, gradients and optimizer state are shared out over the ranks: FSDP2, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from llamahome.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
_ENTRY = "llamahome_call"


def build_mesh(device: str, size: int, replicas: int) -> DeviceMesh:
    """`replicas` groups of ranks; each group holds one whole model (HSDP), a single group is plain FSDP.

    Raises: ConfigError when the ranks cannot be divided so.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if size % replicas:
        raise ConfigError(f"{size} ranks cannot be divided by {replicas}", where="distributed.replicas",
                          fix="choose a divisor of the number of ranks")  # fmt: skip
    if replicas == 1:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def shard_model(
    root: nn.Module, layers: Sequence[nn.Module], mesh: DeviceMesh, *, compute: torch.dtype | None = None,
    trained: torch.dtype | None = None, reshard: bool = True,
) -> Callable[..., Any]:  # fmt: skip
    """Share `root` out over `mesh`, each of its `layers` as a unit and the rest as one; returns how to call into it.

    Every use of a parameter outside of the layers must go through the returned `enter(function, *arguments)`, which
    runs `function` while the rest of the root's parameters are whole.

    compute: type in which weights are gathered and computed with; None keeps theirs. Gradients are always summed in
        fp32, and by sum: the loss is divided by the whole step's trained tokens already.
    trained: type that all weights are brought to first, one unit at a time, so that the whole model never exists in it.
    reshard: free a layer after its forward pass and gather it again for backward; False keeps it and saves traffic.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Inputs stay as they are: what is computed in which type is autocast's business, as with one process.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*layers, root):
        if trained is not None:
            unit.to(trained)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard if unit is not root else None)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(root, _ENTRY, _call)
    register_fsdp_forward_method(root, _ENTRY)

    def enter(function: Callable[..., T], *arguments: Any) -> T:
        result: T = getattr(root, _ENTRY)(function, *arguments)
        if not torch.is_grad_enabled():  # no backward pass will do it
            root.reshard()  # type: ignore[operator]
        return result

    return enter


def _call(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor behind one rank's part; all ranks must call it. A plain tensor is itself."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the parts that this rank holds."""
    from torch.distributed.tensor import DTensor

    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
