"""The engine's rows for other trainers: whole samples end to end in one flat row, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llamahome.data.dataset import StreamingDataset


class FlatCollator:
    """Joins samples into one flat row that transformers' models take as it is.

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=llamahome.model.attention.NAME)
        args = TrainingArguments(..., accelerator_config={"dispatch_batches": False})  # bounds are no rows to share out
        Trainer(model, args, train_dataset=StreamingDataset(store), data_collator=FlatCollator())

    A sample has `input_ids` and, if not all of it is trained, `labels` (not shifted, -100 where nothing is trained); an
    item of packed rows has `position_ids` too, from 0 in each sample. Gives `input_ids`, `labels` and `position_ids`
    int64 [1, T], `cu_seq_lens_q` and `cu_seq_lens_k` int32 [n + 1], `max_length_q` and `max_length_k`: transformers'
    names for the bounds of samples. No token predicts the first one of the next sample.
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        input_ids = torch.cat([_flat(item["input_ids"]) for item in items])
        labels = torch.cat([_flat(item.get("labels", item["input_ids"])) for item in items])
        positions = torch.cat([_positions(item) for item in items])
        starts = (positions == 0).nonzero().squeeze(1)
        bounds = torch.cat([starts, torch.tensor([len(input_ids)])]).to(torch.int32)
        labels[starts] = -100
        longest = int(bounds.diff().max())
        return {
            "input_ids": input_ids[None], "labels": labels[None], "position_ids": positions[None],
            "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip


def _flat(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64).reshape(-1)


def _positions(item: Mapping[str, Any]) -> Tensor:
    if "position_ids" in item:
        return _flat(item["position_ids"])
    return torch.arange(_flat(item["input_ids"]).numel())


def as_datasets(dataset: StreamingDataset) -> Any:
    """`dataset` as an IterableDataset of Hugging Face's `datasets`, for trainers that take nothing else, such as TRL's.

        SFTTrainer(model, SFTConfig(..., max_steps=100, dataset_kwargs={"skip_prepare_dataset": True}),
                   train_dataset=as_datasets(StreamingDataset(store)), data_collator=FlatCollator())

    Raises: ImportError without the package `datasets`.
    """
    from datasets import IterableDataset

    return IterableDataset.from_generator(_lists, gen_kwargs={"dataset": dataset})


def _lists(dataset: StreamingDataset) -> Iterator[dict[str, list[int]]]:
    for item in dataset:
        yield {name: values.flatten().tolist() for name, values in item.items() if name != "cu_seqlens"}
