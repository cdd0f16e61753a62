"""Arithmetic that a training step needs, from the numbers of weights alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations of one training step, as 2 for each multiply and add.

    Attention's own products are left out, as is usual (Kaplan et al. 2020): at 512 tokens a tenth for a small model.
    """

    per_token: float
    per_trained_token: float

    def of(self, tokens: int, trained_tokens: int) -> float:
        return tokens * self.per_token + trained_tokens * self.per_trained_token


def training_flops(
    body_parameters: int, head_parameters: int, *, adapter_parameters: int = 0, trains_base: bool = False
) -> TrainingFlops:
    """Operations per token from the numbers of weights.

    A weight costs 2 forward and 2 for the gradient of its input; 2 more for its own gradient where it is trained: 6N
    for full training, 4N + 6 x adapter for adapters. The output projection (`head_parameters`) is applied to trained
    tokens only. Embeddings cost nothing and belong to neither.
    """
    rate = 6 if trains_base else 4
    return TrainingFlops(rate * body_parameters + 6 * adapter_parameters, rate * head_parameters)
