"""Bytes that training will need, by arithmetic on the model's sizes; neither weights nor torch are needed.

What a layer keeps is in `layers`. Ungated MLPs, mixtures of experts, QLoRA, QAT, compiled and Triton code were not
counted: there the same formulas are an estimate.

The peak of a step is what forward keeps, plus the larger of two that never meet: the buffers of the loss, and what
backward needs for one layer on top.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from llamahome.memory.layers import Adapter, AdapterSettings, backward_per_token, kept_per_token
from llamahome.memory.recompute import entry_per_token, mlp_per_token
from llamahome.memory.shape import ModelShape, model_shape

Method = Literal["lora", "qlora", "full", "qat"]
MIB = 1 << 20
# Python, torch, transformers and PEFT with what PEFT loads (bitsandbytes, torchao), and what the libraries add in the
# first step: measured on Linux x86. A CUDA context and cuBLAS' workspaces take about 500 MiB (not measured here).
RUNTIME_BYTES = {"cpu": 558 * MIB, "cuda": 500 * MIB}
# NF4 (arXiv 2305.14314): 4 bits, 8 bits of scale for each 64 weights, and 32 bits for each 256 of these scales.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# What the C library's heap holds on top of live tensors, as a share of activations and loss (glibc 2.36). It varies:
# the same step was seen with 1.0 and 2.3 under checkpointing. Fused layers: fitted to the resident peaks that
# `benchmarks/governor.py --plans` prints anew. The others are estimates. Keys: fused layers, base is trained, 2-byte
# types, checkpointing.
_HEAP_SLACK = {
    (False, False, True, False): 0.6, (False, False, False, False): 1.0,
    (False, False, True, True): 2.0, (False, False, False, True): 3.0,
    (False, True, True, False): 0.3, (False, True, False, False): 0.3,
    (False, True, True, True): 1.0, (False, True, False, True): 1.0,
    (True, False, True, False): 0.3, (True, False, False, False): 0.1,
    (True, False, True, True): 1.3, (True, False, False, True): 0.7,
    (True, True, True, False): 0.4, (True, True, False, False): 0.3,
    (True, True, True, True): 0.4, (True, True, False, True): 0.4,
}  # fmt: skip
FIRST_STEP_BYTES = 64 * MIB  # libraries' pages and generated code that the first step touches
_GPU_SLACK = 0.05  # of the caching allocator; not measured here
_LOSS_CHUNK_BYTES, _GPU_LOSS_CHUNK_BYTES = 64 * MIB, 512 * MIB
_READER_BYTES = 3 * 24  # three rows of int64 per token, for this step and two read ahead
# Of state per trained weight: two moments in fp32; SGD's momentum; Adafactor keeps sums of rows and columns only.
_OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "sgd": 4.0,
    "adafactor": 0.0,
    "torchao_adamw_4bit": 1.0625,
    "torchao_adamw_fp8": 2.03125,
}
_EIGHT_BITS = 2 * (1 + 4 / 256)  # bitsandbytes: both moments in a byte, with a scale in fp32 for each 256
COMPILE_BYTES = 256 * MIB  # graphs and generated code of one decoder layer's two passes; an estimate
FIXED = ("weights", "adapters", "gradients", "optimizer", "overhead", "gathered", "reader", "compile_scratch")
PARTS = (*FIXED[:4], "activations", "loss", "allocator", *FIXED[4:])


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose at the peak of a step whose largest micro-batch has `micro_batch_tokens` tokens.

    weights: of the base model. adapters: LoRA's weights and their copy in the compute type.
    gradients, optimizer: of what is trained. overhead: the process itself, and copies of weights made in a step.
    gathered: whole layers that are put together from the ranks' parts. reader: steps read ahead.
    compile_scratch: what a compiler leaves in the process.
    quantized_weights: what `weights` would be with QLoRA, for advice.
    gradient_checkpointing: layers that are computed again in backward: none, all, or so many of the first.
    layer_bytes_per_token: what one layer keeps that is not computed again.
    `saved_per_token`, `backward_per_token` and the `loss_` values are the rates behind `activations` and `loss`.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    overhead: int
    micro_batch_tokens: int
    saved_per_token: int
    backward_per_token: int
    loss_row_bytes: int
    loss_rows: int
    loss_constant: int
    trained_fraction: float
    gradient_checkpointing: bool | int
    allocator_share: float
    quantized_weights: int = 0
    recompute_mlp: bool = False
    offload: bool = False
    gathered: int = 0
    reader: int = 0
    compile_scratch: int = 0
    layer_bytes_per_token: int = 0

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the cut."""
        return sum(getattr(self, name) for name in FIXED)

    @property
    def loss(self) -> int:
        """Logits of one chunk of trained tokens, their gradient, and that of a trained output projection."""
        rows = min(self.loss_rows, round(self.trained_fraction * self.micro_batch_tokens))
        return rows * self.loss_row_bytes + self.loss_constant

    @property
    def activations(self) -> int:
        """What forward keeps, and backward's own where it needs more than the loss did."""
        saved = self.saved_per_token * self.micro_batch_tokens
        return saved + max(0, self.backward_per_token * self.micro_batch_tokens - self.loss)

    @property
    def allocator(self) -> int:
        """Memory that the allocator holds between and around the tensors of a step."""
        return int(self.allocator_share * (self.activations + self.loss))

    @property
    def live(self) -> int:
        """The least that can do: everything but the allocator's share."""
        return self.fixed_bytes + self.activations + self.loss

    @property
    def total(self) -> int:
        return self.live + self.allocator

    @property
    def bytes_per_token(self) -> int:
        """What one token more costs in a large micro-batch."""
        return int((1 + self.allocator_share) * (self.saved_per_token + self.backward_per_token))

    def at(self, tokens: int) -> MemoryPlan:
        """The same plan for another size of the largest micro-batch."""
        return replace(self, micro_batch_tokens=tokens)

    def max_tokens(self, limit: float) -> int:
        """The largest micro-batch whose total stays within `limit` bytes; 0 where none does."""
        low, high = 0, max(1, int((limit - self.fixed_bytes) / max(1, self.saved_per_token)) + 1)
        while low < high:  # total rises with the tokens
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle).total <= limit else (low, middle - 1)
        return low

    def to_dict(self) -> dict[str, int | bool]:
        """The parts and their total, for run.json."""
        rates = ("total", "micro_batch_tokens", "bytes_per_token", "fixed_bytes", "loss_rows", "gradient_checkpointing",
                 "recompute_mlp", "offload", "layer_bytes_per_token")  # fmt: skip
        return {name: getattr(self, name) for name in (*PARTS, *rates)}


def plan_memory(
    model_config: Any, *, method: Method = "lora", lora: AdapterSettings | None = None, precision: str = "bf16",
    max_length: int = 512, micro_batch_tokens: int | None = None, gradient_checkpointing: bool | int = False,
    optimizer: str = "adamw", trained_fraction: float = 1.0, loss_chunk: int = 0, device: str = "cpu",
    fused: bool = False, recompute_mlp: bool = False, offload: bool = False, ranks: int = 1, reshard: bool = True,
    step_tokens: int = 0, compiled: bool = False, process_bytes: int | None = None,
) -> MemoryPlan:  # fmt: skip
    """Plan one training step from the model's configuration alone; neither weights nor torch are needed.

    Args:
        model_config: transformers' configuration object, or the content of config.json.
        lora: rank, dropout and target modules; the configuration's section `lora` will do.
        precision: "fp32", or "bf16"/"fp16": autocast over frozen weights of that type; trained weights are fp32.
        max_length: tokens of the longest sample; the micro-batch where `micro_batch_tokens` is not given.
        trained_fraction: share of the tokens whose logits are needed; 1 is safe.
        loss_chunk: rows of logits that exist at a time; 0 chooses by the vocabulary as the loss kernel does.
        gradient_checkpointing: all layers, or so many of the first, are computed again in backward.
        fused: the layers are `llamahome.model.fuse`'s, which keep less.
        recompute_mlp: fused layers make the MLP's gate and up products again in backward.
        offload: a GPU's kept activations lie in host memory until backward wants them.
        ranks: processes that share weights, gradients and optimizer (FSDP2); the result is one rank's.
        reshard: they give a layer back after its forward pass and gather it again for backward.
        step_tokens: tokens of the largest step, for what is read ahead.
        compiled: layers go through torch.compile.
        process_bytes: what the process holds before the model is loaded; by default what it usually is.

    Raises: ModelError for a configuration that is not a decoder's.
    """
    shape, adapter = model_shape(model_config), lora or Adapter()
    low, trains_base = precision != "fp32", method in ("full", "qat")
    element = 2 if low else 4
    adapters = 0 if trains_base else _adapter_parameters(shape, adapter)
    trained = shape.linear_parameters + shape.other_parameters if trains_base else adapters
    shared = ranks > 1 and low and trains_base
    layer = kept_per_token(shape, adapter, low=low, trains_base=trains_base, fused=fused, shared=shared)
    again = shape.layers if gradient_checkpointing is True else min(shape.layers, int(gradient_checkpointing))
    remade = mlp_per_token(shape, low=low) if recompute_mlp and fused and not again else 0
    wide = trains_base and not (shared and fused)
    entry = entry_per_token(shape, low=low, wide=wide)
    kept = again * entry + (shape.layers - again) * (layer - remade)
    # Of what is moved away, one layer's is on its way out while the next is computed.
    here = min(2, shape.layers) * (entry if again == shape.layers else layer - remade) if offload else kept
    backward = backward_per_token(shape, low=low, trains_base=trains_base, fused=fused)
    share = _heap_share(
        (fused, trains_base, low), min(1.0, again / max(1, shape.layers - 1)),
        shape.layers * layer + backward, (shape.layers - 1) * entry + layer + backward,
    )  # fmt: skip
    copied = shape.layers if fused else max(1, shape.layers - again)  # unfused layers keep copies of their weights
    cpu = device.partition(":")[0] == "cpu"
    return MemoryPlan(
        weights=_weights(shape, method, element) // ranks,
        adapters=adapters * (4 + (2 if low else 0)) // ranks,
        gradients=4 * trained // ranks,
        optimizer=int(optimizer_bytes(optimizer) * trained) // ranks,
        overhead=_process(process_bytes, cpu)
        + (0 if shared else _weight_copies(shape, low, method, fused) * copied // shape.layers),
        micro_batch_tokens=micro_batch_tokens or max_length,
        saved_per_token=here + _ends(shape, low, wide, trained_fraction),
        backward_per_token=backward + (layer - entry if again == shape.layers else remade),
        loss_row_bytes=shape.vocabulary * 2 * element,  # two chunks for a moment
        loss_rows=loss_chunk or default_loss_rows(shape.vocabulary, device),
        # The output projection's gradient in fp32, before and after it is scaled.
        loss_constant=8 * shape.vocabulary * shape.hidden if trains_base else 0,
        trained_fraction=trained_fraction,
        gradient_checkpointing=again if 0 < again < shape.layers else again > 0,
        allocator_share=share if cpu else _GPU_SLACK,
        quantized_weights=_weights(shape, "qlora", element) // ranks,
        recompute_mlp=remade > 0,
        offload=offload,
        gathered=_gathered(shape, method, element, reshard) if ranks > 1 else 0,
        reader=_READER_BYTES * step_tokens,
        compile_scratch=COMPILE_BYTES if compiled else 0,
        layer_bytes_per_token=layer - remade,
    )


def _process(held: int | None, cpu: bool) -> int:
    """Bytes of the process without the model; only on a CPU do they count against the same limit."""
    if not cpu:
        return RUNTIME_BYTES["cuda"]
    return RUNTIME_BYTES["cpu"] if held is None else held + FIRST_STEP_BYTES


def _heap_share(kind: tuple[bool, bool, bool], again: float, most: int, least: int) -> float:
    """The heap's share of activations that are so far on the way from `most` (no layer is computed again) to `least`.

    Its bytes are taken to lie on the line between both.
    """
    most_heap, least_heap = most * _HEAP_SLACK[*kind, False], least * _HEAP_SLACK[*kind, True]
    return (most_heap + again * (least_heap - most_heap)) / (most + again * (least - most))


def default_loss_rows(vocabulary: int, device: str = "cpu") -> int:
    """Rows of logits that the loss kernel makes at a time when nothing is asked for."""
    if device.partition(":")[0] == "cpu":
        return max(128, min(4096, _LOSS_CHUNK_BYTES // (4 * vocabulary) // 64 * 64))
    return max(1024, min(4096, _GPU_LOSS_CHUNK_BYTES // (2 * vocabulary) // 256 * 256))


def optimizer_bytes(name: str) -> float:
    """Bytes of state per trained weight; an optimizer of the user's own is taken for one with two moments."""
    return _EIGHT_BITS if "8bit" in name else _OPTIMIZER_BYTES.get(name, 8.0)


def _gathered(shape: ModelShape, method: Method, element: int, reshard: bool) -> int:
    """Whole weights that a rank of FSDP2 holds besides its own parts, in the compute type.

    Embeddings and norms are one unit, whole from forward to backward. Of the layers there are the one at work and the
    next, which is on its way; without `reshard` all. In forward the buffer that a layer came in is kept until the next
    has come; in backward a trained layer's gradient is whole, and once more in fp32 to be summed. Embeddings and
    their gradients are whole twice too, but when no activations are there.
    """
    layer = shape.linear_parameters // shape.layers
    packed = int(layer * (NF4_BYTES if method == "qlora" else element))
    gradient = layer * (element + 4) if method in ("full", "qat") else 0
    layers = packed * (min(2, shape.layers) if reshard else shape.layers)
    return shape.other_parameters * element + layers + max(packed, gradient)


def _adapter_parameters(shape: ModelShape, adapter: AdapterSettings) -> int:
    """A [r, in] and B [out, r] for each adapted projection. DoRA's magnitudes are not worth counting."""
    widths = [shape.projections[name] for name in shape.targets(adapter.target_modules)]
    return shape.layers * adapter.rank * sum(n + m for n, m in widths)


def _weights(shape: ModelShape, method: Method, element: int) -> int:
    if method == "qlora":
        return int(shape.linear_parameters * NF4_BYTES) + shape.other_parameters * element
    return (shape.linear_parameters + shape.other_parameters) * (4 if method in ("full", "qat") else element)


def _weight_copies(shape: ModelShape, low: bool, method: Method, fused: bool) -> int:
    """Copies of the layers' weights that forward makes and backward still needs.

    Autocast casts trained weights to 2 bytes, fused layers one at a time; fake quantisation makes one copy more; QLoRA
    unpacks one weight at a time. A layer's new gradient exists beside the sum of the earlier ones.
    """
    element = 2 if low else 4
    match method:
        case "lora":
            return 0
        case "qlora":
            return element * shape.hidden * shape.mlp
        case "full":
            cast = (2 * shape.hidden * shape.mlp if fused else 2 * shape.linear_parameters) if low else 0
            return cast + 4 * shape.hidden * shape.mlp
        case "qat":
            return ((2 if low else 0) + element) * shape.linear_parameters + 4 * shape.hidden * shape.mlp


def _ends(shape: ModelShape, low: bool, wide: bool, trained_fraction: float) -> int:
    """Outside of the layers: embedding, last norm, rotary tables, and the trained tokens' states and gradients."""
    element = 2 if low and not wide else 4
    states = (12 if wide else 8) * shape.hidden + 2 * element * shape.head_dim
    return states + round(2 * element * shape.hidden * trained_fraction)
