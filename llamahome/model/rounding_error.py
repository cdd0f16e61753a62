"""First values of an adapter on a 4-bit base: the best correction of its rounding errors that the rank allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llamahome.model.quantize import dequantized, forget_pages, quantized_layers, rows_of

if TYPE_CHECKING:
    from peft import PeftModel

_ADAPTER = "default"
_SPARE = 8  # vectors beyond those asked for, which make the iteration settle sooner
_ROUNDS = 6


@torch.no_grad()
def absorb_rounding_error(model: PeftModel, exact: nn.Module, forward: Callable[[], object]) -> float:
    """Let the adapters of 4-bit layers begin where their outputs differ least from those of the layers of `exact`.

    Of a layer with the rounding error E [out, in] and inputs X [tokens, in] that is s B A = U U^T E, where the columns
    of U [out, rank] are the leading left singular vectors of E X^T: no other product of this rank leaves a smaller
    squared error on X (QERA, arXiv 2410.06040). X are the inputs while `forward` runs once, each layer's after those
    before it have their correction. `exact` is the model before quantization, mapped from its files; the pages that
    were read of it are given back. Layers that are not in 4 bits keep their values. With DoRA the magnitudes are those
    of the corrected weights.

    Returns the share of the outputs' squared errors that the adapters take on.
    """
    causal: Any = model.get_base_model()
    users = Counter(p.data_ptr() for _, p in exact.named_parameters(remove_duplicate=False))
    inner = {id(layer) for _, layer in quantized_layers(causal)}
    errors: list[tuple[float, float]] = []
    with ExitStack() as hooks:
        for name, layer in causal.named_modules():
            if id(getattr(layer, "base_layer", None)) in inner and _ADAPTER in getattr(layer, "lora_A", ()):
                source: Any = exact.get_submodule(name)
                begin = partial(_begin, source, users[source.weight.data_ptr()] == 1, errors)
                hooks.enter_context(layer.register_forward_pre_hook(begin))
        forward()
    left, whole = (sum(column) for column in zip(*errors, strict=True)) if errors else (0.0, 0.0)
    return 1 - left / whole if whole else 0.0


def _begin(
    source: Any, alone: bool, errors: list[tuple[float, float]], layer: Any, arguments: tuple[Tensor, ...]
) -> None:
    """Give the adapter of `layer` its values for these inputs; adds the squared errors left and before to `errors`."""
    rounded, original = dequantized(layer.base_layer), rows_of(source)
    error = original.to(rounded.device, torch.float32) - rounded
    if alone:
        forget_pages(source.weight.data)
    outputs = error @ arguments[0].flatten(0, -2).float().T
    up = leading_vectors(outputs, layer.r[_ADAPTER])
    down = up.T @ error
    whole = float(outputs.square().sum())
    errors.append((whole - float((up.T @ outputs).square().sum()), whole))
    # Both factors equally large, so that both learn at the same pace; a row without an error stays as it was.
    size = down.norm(dim=1)
    kept = size > 0
    factor = (size[kept] / layer.scaling[_ADAPTER]).sqrt()
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    b[:, : len(size)][:, kept] = (up[:, kept] * factor).to(b)
    a[: len(size)][kept] = (down[kept] * (factor / size[kept])[:, None]).to(a)
    if magnitudes := getattr(layer, "lora_magnitude_vector", None):
        corrected = rounded + layer.scaling[_ADAPTER] * (b @ a).float()
        magnitudes[_ADAPTER].weight.copy_(corrected.norm(dim=1))


def leading_vectors(matrix: Tensor, count: int) -> Tensor:
    """Left singular vectors [m, min(count, m, n)] of the largest singular values of `matrix` [m, n], largest first.

    By subspace iteration from fixed random vectors (Halko, Martinsson and Tropp, arXiv 0909.4061): a few products with
    the matrix instead of a decomposition in m^3 operations, and the same bits each time.
    """
    count = min(count, *matrix.shape)
    width = min(count + _SPARE, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0)).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left = torch.linalg.svd(basis.T @ matrix, full_matrices=False).U
    vectors: Tensor = basis @ left[:, :count]
    return vectors
