"""Loss, perplexity and token accuracy on held-out samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamahome.data.batch import BatchProcessor
from llamahome.data.dataset import StepOrder
from llamahome.data.store import TokenStore
from llamahome.errors import DataError
from llamahome.memory.oom import free_memory, is_oom
from llamahome.model.adapters import without_input_casts
from llamahome.training.objective import Objective, build_objective, evaluating
from llamahome.training.precision import Precision, resolve_precision
from llamahome.training.step import StepBatches
from llamahome.training.team import SINGLE, Team

if TYPE_CHECKING:
    from llamahome.config import Config


@dataclass(frozen=True)
class Evaluation:
    """Means over the trained tokens of all samples."""

    loss: float
    perplexity: float
    token_accuracy: float
    samples: int
    trained_tokens: int


@torch.no_grad()
def evaluate_store(
    objective: Objective, store: TokenStore, *, precision: Precision, token_budget: int, max_samples: int | None = None,
    team: Team = SINGLE,
) -> Evaluation:  # fmt: skip
    """Evaluate on the first `max_samples` samples of a store (all without it), in cuts of `token_budget` tokens.

    Of several ranks in a `team` each takes its share, and all get the figures of all samples.
    A cut that runs out of memory is halved. Raises: DataError when there is no trained token.
    """
    samples = np.arange(min(len(store), max_samples or len(store)), dtype=np.int64)
    ranks = team.ranks
    batches = StepBatches(
        store, StepOrder(len(store), len(store), 0), BatchProcessor(store, round_rows=objective.rounds_rows),
        None if objective.packs else 1, rank=ranks.rank, ranks=ranks.size, in_lockstep=team.in_lockstep,
    )  # fmt: skip
    loss, correct = torch.zeros((), dtype=torch.float64), 0
    model = objective.model
    with evaluating(model), without_input_casts(model, precision.lowers), precision.autocast():
        for ids in batches.cut(samples, token_budget):
            part_loss, part_correct = _statistics(objective, batches, ids)
            team.progress()
            loss += part_loss
            correct += part_correct
    tokens = int(store.trained_counts(samples).sum())
    if not tokens:
        raise DataError("no trained token to evaluate", fix="check the data with: llamahome data check")
    total, right = ranks.sum([float(loss), correct])
    mean = total / tokens
    return Evaluation(mean, math.exp(min(mean, 700.0)), right / tokens, len(samples), tokens)


def _statistics(objective: Objective, batches: StepBatches, ids: NDArray[np.int64]) -> tuple[Tensor, int]:
    """Summed loss (fp64) and right tokens of these samples, in halves where memory runs out for all of them."""
    try:
        loss, correct = objective.statistics(batches.build(ids))
        return loss.double().cpu(), int(correct)
    except Exception as error:
        if len(ids) <= 1 or not is_oom(error):
            raise
    free_memory()  # outside of the `except`, which keeps the failed call's tensors alive
    halves = [_statistics(objective, batches, half) for half in np.array_split(ids, 2)]
    return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]


def evaluate(model: str | Path, data: str | Path, config: Config | None = None) -> Evaluation:
    """Evaluate a model, adapter or checkpoint folder on a data file; what `llamahome train-eval` calls.

    On all samples, unless `config` was given `training.eval_samples`.
    Raises: ModelError, DataError, ConfigError.
    """
    from llamahome.config import Config
    from llamahome.training.host import set_threads
    from llamahome.training.setup import load_trained_model, prepare_evaluation, resolve_device

    config = config or Config.load()
    device = resolve_device(config)
    set_threads(config)
    precision = resolve_precision(config, device)
    trained, tokenizer = load_trained_model(str(model), config, device, precision)
    store = prepare_evaluation(data, tokenizer, config)
    objective = build_objective(trained)
    budget = max(2048, int(store.lengths().max(initial=0)))
    asked = "eval_samples" in config.training.model_fields_set
    max_samples = config.training.eval_samples if asked else None
    return evaluate_store(objective, store, precision=precision, token_budget=budget, max_samples=max_samples)
