"""Data paths to datasets for anybody's loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llamahome.config import Config
from llamahome.data.dataset import StreamingDataset
from llamahome.data.prepare import Data, Prepared, prepare
from llamahome.data.store import TokenStore


@dataclass(frozen=True)
class Datasets:
    """Training and validation samples; `prepared` holds their stores and the report. Close it when done."""

    train: StreamingDataset
    validation: StreamingDataset | None
    prepared: Prepared


class DataManager:
    """Turns data files into datasets with one tokenizer and one configuration."""

    def __init__(self, tokenizer: Any, config: Config | None = None, *, vocab_size: int | None = None) -> None:
        """`vocab_size` is the model's, to check the tokens against."""
        self.tokenizer, self.config, self.vocab_size = tokenizer, config or Config(), vocab_size

    def load(
        self,
        data: Data,
        eval_data: Data | None = None,
        *,
        rows: Literal["samples", "packed", "fixed"] = "samples",
        rank: int = 0,
        world_size: int = 1,
    ) -> Datasets:
        """Prepare (or find) the tokens of `data`; validation comes from `eval_data` or data.validation_split.

        `rows`, `rank` and `world_size` as in StreamingDataset; rows have data.max_length tokens. Validation samples
        keep their order. Raises: as `prepare`.
        """
        prepared = prepare(data, self.tokenizer, config=self.config, eval_data=eval_data, vocab_size=self.vocab_size)

        def dataset(store: TokenStore, shuffle: bool) -> StreamingDataset:
            return StreamingDataset(
                store,
                rows=rows,
                length=self.config.data.max_length,
                seed=self.config.training.seed,
                shuffle=shuffle,
                rank=rank,
                world_size=world_size,
                read_ahead=self.config.data.buffer_size,
            )

        validation = dataset(prepared.validation, False) if prepared.validation else None
        return Datasets(dataset(prepared.train, self.config.data.shuffle), validation, prepared)
