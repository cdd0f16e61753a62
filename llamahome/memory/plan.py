"""Bytes that training will need, by arithmetic on the model's sizes.

Method: the tensors that autograd keeps were counted for layers of eleven shapes (eager PyTorch 2.13, transformers
5.23, PEFT 0.21, attention that saves q, k, v, output and log-sum-exp), and the coefficients of each size were solved
for; they come out whole and exact. Symbols: h hidden, f MLP width, a heads x head size, kv key-value heads x head
size, hq heads, d head size, r rank, e bytes of the compute type. Ungated MLPs, mixtures of experts, QLoRA, QAT,
compiled and Triton code were not counted: there the same formulas are an estimate.

The peak of a step is what forward keeps, plus the larger of two that never meet: the buffers of the loss, and what
backward needs for one layer on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from llamahome.memory.shape import ModelShape, model_shape

Method = Literal["lora", "qlora", "full", "qat"]
MIB = 1 << 20
# Python, torch, transformers and PEFT loaded (355 MB on Linux x86), and what the libraries add in the first step. A
# CUDA context and cuBLAS' workspaces take about 500 MiB (not measured here).
RUNTIME_BYTES = {"cpu": 360 * MIB, "cuda": 500 * MIB}
_NF4_BYTES = 0.516  # 4 bits, and a doubly quantised scale for each 64 weights
# What the C library's heap holds on top of live tensors, as a share of activations and loss. Fitted to the resident
# peaks of 18 runs: glibc 2.36, two depths of SmolLM2-135M and a tiny model, 512 to 8,192 tokens; the plan then comes
# within 8 % of 15 of them and 20 % of all. Keys: base is trained, 2-byte types, checkpointing.
_HEAP_SLACK = {
    (False, True, False): 0.6, (False, False, False): 1.0, (False, True, True): 2.0, (False, False, True): 3.0,
    (True, True, False): 0.3, (True, False, False): 0.3, (True, True, True): 1.0, (True, False, True): 1.0,
}  # fmt: skip
_GPU_SLACK = 0.05  # of the caching allocator; not measured here
_LOSS_CHUNK_BYTES = 64 * MIB
_OPTIMIZER_BYTES = {"adamw": 8, "sgd": 0, "adafactor": 0}


class AdapterSettings(Protocol):
    """What of the section `lora` of the configuration counts here."""

    @property
    def rank(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def target_modules(self) -> str | Sequence[str]: ...


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings without a configuration."""

    rank: int = 16
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose at the peak of a step whose largest micro-batch has `micro_batch_tokens` tokens.

    weights: of the base model. adapters: LoRA's weights and their copy in the compute type.
    gradients, optimizer: of what is trained. overhead: the process itself, and copies of weights made in a step.
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
    gradient_checkpointing: bool
    allocator_share: float

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the cut."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.overhead

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
        parts = ("weights", "adapters", "gradients", "optimizer", "activations", "loss", "allocator", "overhead")
        rates = ("total", "micro_batch_tokens", "bytes_per_token", "fixed_bytes", "gradient_checkpointing")
        return {name: getattr(self, name) for name in (*parts, *rates)}


def plan_memory(
    model_config: Any, *, method: Method = "lora", lora: AdapterSettings | None = None, precision: str = "bf16",
    max_length: int = 512, micro_batch_tokens: int | None = None, gradient_checkpointing: bool = False,
    optimizer: str = "adamw", trained_fraction: float = 1.0, loss_chunk: int = 0, device: str = "cpu",
) -> MemoryPlan:  # fmt: skip
    """Plan one training step from the model's configuration alone; neither weights nor torch are needed.

    Args:
        model_config: transformers' configuration, or the content of config.json.
        precision: "fp32", or "bf16"/"fp16": autocast over frozen weights of that type; trained weights are fp32.
        max_length: tokens of the longest sample; the micro-batch where `micro_batch_tokens` is not given.
        trained_fraction: share of the tokens whose logits are needed; 1 is safe.
        loss_chunk: rows of logits that exist at a time; 0 chooses by the vocabulary as the loss kernel does.

    Raises: ModelError for a configuration that is not a decoder's.
    """
    shape, adapter = model_shape(model_config), lora or Adapter()
    low, trains_base = precision != "fp32", method in ("full", "qat")
    element = 2 if low else 4
    parameters = shape.linear_parameters + shape.other_parameters
    adapters = 0 if trains_base else _adapter_parameters(shape, adapter)
    trained = parameters if trains_base else adapters
    layer = _full_layer(shape, low) if trains_base else _lora_layer(shape, adapter, low)
    entry = shape.hidden * (2 if low and not trains_base else 4)
    kept = shape.layers * (entry if gradient_checkpointing else layer)
    backward = _backward(shape, low, trains_base)
    copies = _weight_copies(shape, low, method) // (shape.layers if gradient_checkpointing else 1)
    return MemoryPlan(
        weights=_weights(shape, method, element),
        adapters=adapters * (4 + (2 if low else 0)),
        gradients=4 * trained,
        optimizer=_OPTIMIZER_BYTES.get(optimizer, 8) * trained,
        overhead=RUNTIME_BYTES[device.partition(":")[0]] + copies,
        micro_batch_tokens=micro_batch_tokens or max_length,
        saved_per_token=kept + _ends(shape, low, trains_base, trained_fraction),
        backward_per_token=backward + (layer - entry if gradient_checkpointing else 0),
        loss_row_bytes=shape.vocabulary * (10 if low else 8),
        loss_rows=loss_chunk or max(128, min(4096, _LOSS_CHUNK_BYTES // (4 * shape.vocabulary) // 64 * 64)),
        loss_constant=shape.vocabulary * shape.hidden * (10 if low else 8) if trains_base else 0,
        trained_fraction=trained_fraction,
        gradient_checkpointing=gradient_checkpointing,
        allocator_share=_HEAP_SLACK[trains_base, low, gradient_checkpointing] if device == "cpu" else _GPU_SLACK,
    )


def _adapter_parameters(shape: ModelShape, adapter: AdapterSettings) -> int:
    """A [r, in] and B [out, r] for each adapted projection. DoRA's magnitudes are not worth counting."""
    widths = [shape.projections[name] for name in shape.targets(adapter.target_modules)]
    return shape.layers * adapter.rank * sum(n + m for n, m in widths)


def _weights(shape: ModelShape, method: Method, element: int) -> int:
    if method == "qlora":
        return int(shape.linear_parameters * _NF4_BYTES) + shape.other_parameters * 2
    return (shape.linear_parameters + shape.other_parameters) * (4 if method in ("full", "qat") else element)


def _weight_copies(shape: ModelShape, low: bool, method: Method) -> int:
    """Copies of the layers' weights that forward makes and backward still needs.

    Autocast casts trained weights to 2 bytes; fake quantisation makes one copy more; QLoRA unpacks one weight at a
    time. A trained weight's new gradient exists beside the sum of the earlier ones.
    """
    element = 2 if low else 4
    match method:
        case "lora":
            return 0
        case "qlora":
            return 2 * shape.hidden * shape.mlp
        case "full":
            return (2 * shape.linear_parameters if low else 0) + 4 * shape.largest_weight
        case "qat":
            return ((2 if low else 0) + element) * shape.linear_parameters + 4 * shape.largest_weight


def _lora_layer(shape: ModelShape, adapter: AdapterSettings, low: bool) -> int:
    """Bytes that one layer keeps per token, adapters in fp32 on frozen weights.

    All linear layers adapted: 18h + 8f + 6a + 4kv + 14r + 4hq + 8 in bf16, 16h + 16f + 8a + 8kv + 28r + 4hq + 8 in
    fp32. In bf16 each adapter keeps its own copy of its input, in fp32 those with one input share it; dropout keeps
    a mask of 4 bytes and, in fp32, an input of its own.
    """
    h, f, a, kv = shape.hidden, shape.mlp, shape.attention, shape.key_value
    targets = shape.targets(adapter.target_modules)
    inputs = {name: shape.projections[name][0] for name in targets}
    ranks = len(targets) * adapter.rank
    if low:
        kept = 8 * h + 6 * f + 4 * a + 4 * kv + 2 * ranks + 2 * sum(inputs.values())
    else:
        groups = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
        shared = 4 * h * sum(not group.isdisjoint(inputs) for group in groups)
        own = 4 * sum(inputs.values()) if adapter.dropout else shared + 4 * inputs.get("down_proj", 0)
        kept = 8 * h + 12 * f + 8 * a + 8 * kv + 4 * ranks + own
    return kept + (4 * sum(inputs.values()) if adapter.dropout else 0) + 4 * shape.heads + 8


def _full_layer(shape: ModelShape, low: bool) -> int:
    """Bytes that one layer keeps per token when its weights are trained in fp32."""
    h, f, a, kv = shape.hidden, shape.mlp, shape.attention, shape.key_value
    rates = 26 * h + 8 * f + 4 * a + 4 * kv if low else 24 * h + 16 * f + 8 * a + 8 * kv
    return rates + 4 * shape.heads + 8


def _ends(shape: ModelShape, low: bool, trains_base: bool, trained_fraction: float) -> int:
    """Outside of the layers: embedding, last norm, rotary tables, and the trained tokens' states and gradients."""
    element = 2 if low and not trains_base else 4
    states = (12 if trains_base else 8) * shape.hidden + 2 * element * shape.head_dim
    return states + round(2 * element * shape.hidden * trained_fraction)


def _backward(shape: ModelShape, low: bool, trains_base: bool) -> int:
    """Temporaries of backward per token, on top of what was kept: at the MLP's product or at a norm."""
    h, f = shape.hidden, shape.mlp
    if trains_base:
        return max(20 * h, 4 * f if low else 8 * f)
    return max(6 * h + 6 * f, 22 * h) if low else max(4 * h + 8 * f, 24 * h)
