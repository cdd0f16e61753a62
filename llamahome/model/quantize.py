"""QLoRA's base model: linear layers in 4-bit NF4 with doubly quantised scales (arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import mmap
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llamahome.errors import MissingError
from llamahome.kernels.nf4 import BLOCK, dequantize, from_bitsandbytes
from llamahome.memory.oom import free_memory
from llamahome.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
NF4 = "nf4"
_PART = 1 << 17  # weights that are quantised at once, which takes some 37 bytes for each
_TRIM = 1 << 24  # weights after which the heap gives back what was in use between them
_DONTNEED = 4  # madvise(2)


def check_nf4(device: torch.device | str) -> None:
    """Whether 4-bit weights can be trained on here, asked before anything is loaded. Raises: MissingError."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(
            "4-bit weights need the package bitsandbytes", where="training.method",
            fix='pip install "llamahome[qlora]", or use training.method: lora',
        )  # fmt: skip
    if (kind := torch.device(device).type) not in ("cpu", "cuda"):
        raise MissingError(f"4-bit weights run on CPUs and CUDA, not on {kind}", where="processing.device",
                           fix="use training.method: lora")  # fmt: skip


def quantize_model(model: PreTrainedModel, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Put 4-bit layers in the place of the linear layers of `model`, in place, one at a time.

    Layers whose input is no multiple of 64 wide stay as they are. They, the output projection and all that is no
    linear layer become `dtype`, the type that 4-bit weights are unpacked to. A weight is dropped as soon as it is
    quantised, and so are its pages where it is mapped from a file: the peak of memory is near the result's. The same
    weights give the same bits.
    """
    head = model.get_output_embeddings()
    users = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    counted, since = {True: 0, False: 0}, 0
    for name, module in list(model.named_modules()):
        if module is head or not _fits(module):
            continue
        weight = module.weight.data
        counted[True] += weight.numel()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _quantized(module, dtype, device))
        if users[weight.data_ptr()] == 1:
            forget_pages(weight)
        since += weight.numel()
        del weight
        if since > _TRIM:
            free_memory()
            since = 0
    for parameter in model.parameters():
        if parameter.is_floating_point():  # 4-bit ones are bytes
            counted[False] += parameter.numel()
            parameter.data = parameter.data.to(device, dtype)
    for owner in model.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            owner._buffers[key] = buffer.to(device)
    free_memory()
    model.is_loaded_in_4bit = True  # PEFT asks for it
    share = counted[True] / sum(counted.values())
    (logger.info if share > 0.5 else logger.warning)("%.0f %% of the weights are in 4 bits", 100 * share)
    return model


def _fits(module: Any) -> bool:
    """A linear layer whose rows are whole blocks: bitsandbytes 0.50 unpacks others wrongly on a CPU."""
    from transformers.pytorch_utils import Conv1D

    columns = {nn.Linear: 1, Conv1D: 0}.get(type(module))
    return columns is not None and module.weight.shape[columns] % BLOCK == 0


def rows_of(module: Any) -> Tensor:
    """The weight [out, in] of a linear layer; transformers' Conv1D holds it the other way round."""
    weight: Tensor = module.weight.data
    return weight if type(module) is nn.Linear else weight.T


def _quantized(module: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The 4-bit layer with the weights of `module`, which loses them."""
    rows = rows_of(module)
    layer = _empty_layer(rows.shape, dtype)
    layer.weight = _params4bit(rows.to(device), dtype)
    layer.weight.module = layer
    layer.quant_state = layer.weight.quant_state
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.data.to(device, dtype), requires_grad=False)
    module.weight = None
    layer.train(module.training)
    return layer


def _empty_layer(shape: torch.Size, dtype: torch.dtype) -> Any:
    with quiet_transformers():
        from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(shape[1], shape[0], bias=False, compute_dtype=dtype, quant_type=NF4, device="meta")
    # Else a forward pass without gradient rearranges the packed weight in place (bitsandbytes 0.50, CPUs with
    # AVX512-BF16), and a training step after it gets no gradient for its input.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _params4bit(weight: Tensor, dtype: torch.dtype) -> Any:
    """The 4-bit parameter of `weight` [out, in], to be unpacked to `dtype`.

    bitsandbytes makes several copies in float32, so it gets a part at a time; blocks know nothing of each other.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    flat, place = weight.contiguous().flatten(), weight.device
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=place)
    scales = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32, device=place)
    for start in range(0, flat.numel(), _PART):
        part, state = quantize_4bit(flat[start : start + _PART], blocksize=BLOCK, quant_type=NF4)
        packed[start // 2 : start // 2 + len(part)] = part
        scales[start // BLOCK : start // BLOCK + len(state.absmax)] = state.absmax
    offset = scales.double().mean().float()  # the same for any number of threads
    absmax, nested = quantize_blockwise(scales - offset, blocksize=256)
    state = QuantState(
        absmax=absmax, shape=weight.shape, dtype=dtype, blocksize=BLOCK, code=get_4bit_type(NF4, device=place),
        quant_type=NF4, offset=offset, state2=nested,
    )  # fmt: skip
    return Params4bit(packed, quant_state=state, blocksize=BLOCK, quant_type=NF4, bnb_quantized=True)


def forget_pages(weight: Tensor) -> None:
    """Give back the memory of a tensor that nobody reads again, whoever still holds it.

    A mapped file's pages count as the process's memory until the whole file is unmapped.
    """
    if weight.device.type != "cpu" or not sys.platform.startswith("linux") or not weight.is_contiguous():
        return
    page = mmap.PAGESIZE
    first = -(-weight.data_ptr() // page) * page
    length = (weight.data_ptr() + weight.nbytes) // page * page - first
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _DONTNEED)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the 4-bit layers; for those with an adapter that of the layer inside."""
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn import Linear4bit

        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))


def dequantize_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Put plain linear layers with the unpacked weights, in `dtype`, in the place of the 4-bit ones."""
    for name, module in list(quantized_layers(model)):
        weight = dequantized(module).to(dtype)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            layer.bias = nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    if hasattr(model, "is_loaded_in_4bit"):
        del model.is_loaded_in_4bit


def dequantized(layer: Any) -> Tensor:
    """The weight [out, in] of a 4-bit layer, unpacked in float32: 16 levels times a scale for each 64 weights."""
    weight: Tensor = dequantize(from_bitsandbytes(layer.weight), torch.float32)
    return weight
