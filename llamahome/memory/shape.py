"""The sizes of a decoder that decide its memory, read from a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.errors import ModelError

_UNGATED = frozenset({"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "codegen", "starcoder2"})


@dataclass(frozen=True)
class ModelShape:
    """h hidden, f MLP width (of all active experts), a = heads x head size, kv = key-value heads x head size."""

    layers: int
    hidden: int
    mlp: int
    attention: int
    key_value: int
    heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    gated: bool = True
    experts: int = 1
    active_experts: int = 1

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear layer of a decoder layer, under Llama's names."""
        h, f, a, kv = self.hidden, self.mlp, self.attention, self.key_value
        mlp = {"gate_proj": (h, f)} if self.gated else {}
        mlp |= {"up_proj": (h, f), "down_proj": (f, h)}
        return {"q_proj": (h, a), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (a, h), **mlp}

    @property
    def linear_parameters(self) -> int:
        """Weights of the decoder layers' linear layers, all experts included."""
        attention = sum(n * m for name, (n, m) in self.projections.items() if name[0] in "qkvo")
        mlp = sum(n * m for name, (n, m) in self.projections.items() if name[0] not in "qkvo")
        return self.layers * (attention + mlp * self.experts // self.active_experts)

    @property
    def other_parameters(self) -> int:
        """Embedding, output projection where it is not the embedding, and norms."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + (2 * self.layers + 1) * self.hidden

    def targets(self, target_modules: str | Sequence[str]) -> list[str]:
        """The projections that get an adapter. Names of other architectures count as all of them."""
        if isinstance(target_modules, str):
            return list(self.projections)
        known = [name for name in self.projections if name in {target.rsplit(".")[-1] for target in target_modules}]
        return known or list(self.projections)


def model_shape(config: Any) -> ModelShape:
    """The shape of a model from its configuration: transformers' object, or the content of config.json.

    Raises: ModelError that names what is missing.
    """
    config = _text_part(config)
    hidden, heads = _whole(config, "hidden_size", "n_embd"), _whole(config, "num_attention_heads", "n_head")
    head_dim = _optional(config, "head_dim") or hidden // heads
    experts = _optional(config, "num_local_experts", "num_experts", "n_routed_experts") or 1
    active = min(experts, _optional(config, "num_experts_per_tok") or 1)
    width = (_optional(config, "moe_intermediate_size") if experts > 1 else None) or _optional(
        config, "intermediate_size", "n_inner"
    )
    return ModelShape(
        layers=_whole(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        mlp=(width or 4 * hidden) * active,
        attention=heads * head_dim,
        key_value=(_optional(config, "num_key_value_heads") or heads) * head_dim,
        heads=heads,
        head_dim=head_dim,
        vocabulary=_whole(config, "vocab_size"),
        tied=bool(_get(config, "tie_word_embeddings")),
        gated=_get(config, "model_type") not in _UNGATED,
        experts=experts,
        active_experts=active,
    )


def _text_part(config: Any) -> Any:
    """The language model's part of a configuration with several parts."""
    return _get(config, "text_config") or config


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _optional(config: Any, *names: str) -> int | None:
    values = (_get(config, name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _whole(config: Any, *names: str) -> int:
    value = _optional(config, *names)
    if value is None:
        kind = _get(config, "model_type") or "unknown"
        raise ModelError(f"{names[0]} is missing in the configuration of a model of type {kind!r}",
                         where="config.json", fix="use a decoder language model")  # fmt: skip
    return value
