"""Values that an adapter begins with, where they depend on the data."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from llamahome.config import Config
from llamahome.data.batch import BatchProcessor
from llamahome.data.dataset import StepOrder
from llamahome.data.store import TokenStore
from llamahome.distributed.ranks import Ranks
from llamahome.errors import MemoryLimitError
from llamahome.memory.oom import free_memory, is_oom, twice
from llamahome.model.adapters import trainable_parameters, without_input_casts
from llamahome.model.load import load_model, source_of
from llamahome.model.quantize import NF4
from llamahome.model.rounding_error import absorb_rounding_error
from llamahome.training.objective import Objective, decode, evaluating
from llamahome.training.precision import Precision
from llamahome.training.step import Ids

logger = logging.getLogger(__name__)
_TOKENS = 2048


def begin_adapter(model: Any, config: Config, store: TokenStore, precision: Precision, ranks: Ranks) -> None:
    """Let the adapter of a 4-bit base correct its rounding errors, as `lora.absorb_rounding` says.

    How they come out at the layers is seen on the first samples of the run, of some 2,048 tokens together. Rank 0
    computes, the others take its values. Raises: MemoryLimitError.
    """
    if config.training.method != "qlora" or not config.lora.absorb_rounding:
        return
    ids = _first_samples(store, config, packs=Objective(model).packs)
    ranks.decide(lambda: _absorb(model, store, ids, precision), "let the adapter correct rounding errors")
    ranks.copy_from_main(parameter.data for _, parameter in trainable_parameters(model))


def _first_samples(store: TokenStore, config: Config, *, packs: bool) -> Ids:
    """The first samples of the run that have so many tokens together; only one where they cannot share a row."""
    order = StepOrder(len(store), min(len(store), _TOKENS), seed=config.training.seed, shuffle=config.data.shuffle)
    ids = order.samples(0)
    enough = int(np.searchsorted(np.cumsum(store.lengths(ids)), _TOKENS, side="right"))
    return ids[: max(1, enough) if packs else 1]


def _absorb(model: Any, store: TokenStore, ids: Ids, precision: Precision) -> None:
    try:
        twice(lambda: _correct(model, store, ids, precision))
    except Exception as error:
        if not is_oom(error):
            raise
        raise MemoryLimitError(
            "no memory to let the adapter correct the base's rounding errors", where="training.memory_limit",
            fix="raise it, or set lora.absorb_rounding: false",
        ) from error  # fmt: skip
    free_memory()


def _correct(model: Any, store: TokenStore, ids: Ids, precision: Precision) -> None:
    causal, source = model.get_base_model(), source_of(model)
    assert source is not None
    exact = load_model(source, dtype=None, device="cpu", attention="eager")
    batch = BatchProcessor(store).build(ids).to(causal.get_input_embeddings().weight.device)

    def forward() -> None:
        with precision.autocast():
            decode(causal, batch)

    with evaluating(model), without_input_casts(model, precision.lowers):
        share = absorb_rounding_error(model, exact, forward)
    logger.info(
        "the adapter begins with %.0f %% of the %s errors in it, seen on %d tokens", 100 * share, NF4, batch.num_tokens
    )
