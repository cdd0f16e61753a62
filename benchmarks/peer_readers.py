"""The token reader beside other libraries' readers, on the same tokens, in one process and in turn.

Fixed rows: 8 x 2,048 shuffled tokens as fresh int64 ids and labels, against litdata, Hugging Face datasets and a torch
loop over a mapped file. Documents: tokens with positions that begin anew in each document, against datatrove (read in
sequence, as it is made for) and Megatron-core's reset_position_ids (its own function on rows of a mapped file, which is
faster than its GPTDataset); ours are whole documents, best-fit packed and shuffled, with labels and cu_seqlens. And the
packing plan against TRL's. No worker processes: they made each of these slower. A peer that is not installed is named
and left out.

    pip install litdata datatrove megatron-core        # in an environment of their own beside llamahome
    python benchmarks/peer_readers.py [--quick] [--json]

Million tokens per second of processor time, all threads counted; medians over rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DISABLE_OPTIMIZED_DATASET_TELEMETRY", "1")

import numpy as np
import reader as own
import torch

from llamahome import _C
from llamahome.data.store import TokenStore

ROWS, WIDTH = own.ROWS, own.WIDTH
EOD = 0
Read = Callable[[], int]  # some tokens; how many they were


def read_own_fixed(folder: Path, tokens: np.ndarray, batches: int) -> Read:
    store = TokenStore.open(folder / "text")
    rows = np.random.default_rng(1).integers(0, store.num_tokens // WIDTH, batches * ROWS)
    own.fixed_reused(store, np.arange(store.num_tokens // WIDTH // ROWS * ROWS))  # checks every block once
    return lambda: own.fixed_fresh(store, rows)


def read_own_documents(folder: Path, tokens: np.ndarray, batches: int) -> Read:
    store, epochs = TokenStore.open(folder / "chats"), iter(range(1, 1 << 30))
    own.packed(store, 0)
    return lambda: own.packed(store, next(epochs))


def read_torch_loop(folder: Path, tokens: np.ndarray, batches: int) -> Read:
    shard = folder / "text" / "shard-00000.tokens"
    mapped = torch.from_file(str(shard), shared=True, size=own.HEADER // 2 + len(tokens), dtype=torch.uint16)
    rows = np.random.default_rng(1).integers(0, len(tokens) // WIDTH, batches * ROWS)
    own.torch_loop(mapped, np.arange(len(tokens) // WIDTH))  # maps every page
    return lambda: own.torch_loop(mapped, rows)


def read_hf_datasets(folder: Path, tokens: np.ndarray, batches: int) -> Read:
    import datasets

    whole = tokens[: len(tokens) // WIDTH * WIDTH].reshape(-1, WIDTH)
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("uint16"), length=WIDTH)})
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"input_ids": list(whole)}, features=features)
    made.save_to_disk(str(folder / "hf"))
    data = datasets.load_from_disk(str(folder / "hf")).with_format("numpy")
    rows = np.random.default_rng(1).integers(0, len(whole), batches * ROWS)

    def read() -> int:
        for begin in range(0, len(rows), ROWS):
            ids = torch.from_numpy(data[rows[begin : begin + ROWS]]["input_ids"].astype(np.int64))
            ids.clone()  # the labels
        return rows.size * WIDTH

    return read


def _whole(path: str) -> Iterator[torch.Tensor]:
    yield torch.from_numpy(np.load(path).astype(np.uint16))


def read_litdata(folder: Path, tokens: np.ndarray, batches: int) -> Read:
    import litdata

    np.save(folder / "tokens.npy", tokens)
    target = str(folder / "litdata")
    options: dict[str, Any] = {"chunk_bytes": "64MB", "num_workers": 1, "start_method": "fork"}
    loader = litdata.TokensLoader(block_size=WIDTH)
    litdata.optimize(_whole, [str(folder / "tokens.npy")], target, item_loader=loader, **options)
    data = litdata.StreamingDataset(target, item_loader=litdata.TokensLoader(block_size=WIDTH), shuffle=True)
    stream = _endless(litdata.StreamingDataLoader(data, batch_size=ROWS, num_workers=0))

    def read() -> int:
        for batch in islice(stream, batches):
            ids = batch.to(torch.int64)
            ids.clone()  # the labels
        return batches * ROWS * WIDTH

    return read


def _endless(loader: Any) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


def read_datatrove(folder: Path, tokens: np.ndarray, batches: int) -> Read:
    from datatrove.utils.dataset import DatatroveFileDataset

    tokens.tofile(folder / "tokens.ds")
    (np.flatnonzero(tokens == EOD) + 1).astype(np.uint64).tofile(folder / "tokens.ds.index")
    data = DatatroveFileDataset(str(folder / "tokens.ds"), WIDTH, token_size=2, return_positions=True)
    numbers = cycle(range(len(data)))

    def read() -> int:
        for _ in range(batches):
            items = [data[i] for i in islice(numbers, ROWS)]
            torch.stack([item["input_ids"] for item in items])
            torch.stack([item["positions"] for item in items])
        return batches * ROWS * WIDTH

    return read


def read_megatron(folder: Path, tokens: np.ndarray, batches: int) -> Read:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids as finish

    tokens.tofile(folder / "tokens.bin")
    mapped = np.memmap(folder / "tokens.bin", np.uint16, "r")
    starts = np.random.default_rng(1).integers(0, len(tokens) // WIDTH - 1, batches * ROWS) * WIDTH

    def one(start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row = torch.from_numpy(mapped[start : start + WIDTH + 1].astype(np.int64))
        _, loss_mask, positions = finish(row[:-1], EOD, True, False, True, False)
        return row[:-1], loss_mask, positions

    def read() -> int:
        for begin in range(0, len(starts), ROWS):
            for parts in zip(*(one(start) for start in starts[begin : begin + ROWS].tolist()), strict=True):
                torch.stack(parts)
        return len(starts) * WIDTH

    return read


# By name: the module it needs, what it is compared with, how to make it, and its share of our batches.
PEERS: dict[str, tuple[str, str, Callable[[Path, np.ndarray, int], Read], int]] = {
    "torch_loop": ("torch", "fixed", read_torch_loop, 2),
    "litdata": ("litdata", "fixed", read_litdata, 8),
    "hf_datasets": ("datasets", "fixed", read_hf_datasets, 16),
    "datatrove_positions": ("datatrove", "documents", read_datatrove, 32),
    "megatron_reset_position_ids": ("megatron", "documents", read_megatron, 64),
}
OWN = {"fixed": read_own_fixed, "documents": read_own_documents}


def compare(folder: Path, batches: int, rounds: int) -> dict[str, float]:
    """Rates of each peer and of ours in the same rounds, and the medians of the ratios."""
    tokens = stream(folder / "text")
    sides = {name: make(folder, tokens, batches) for name, make in OWN.items()}
    for name, (module, _, make, share) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: {module} is not installed, left out")
        else:
            sides[name] = make(folder, tokens, max(8, batches // share))
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, read in sides.items():
            rates[name].append(own.rate(read, time.process_time))
    result = {f"{name}_mtokens_per_s": statistics.median(found) for name, found in rates.items()}
    for name in sides.keys() & PEERS.keys():
        pairs = zip(rates[PEERS[name][1]], rates[name], strict=True)
        result[f"ratio_{name}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return result


def stream(folder: Path) -> np.ndarray:
    """The tokens of a store, with the end of a document in place of its last token."""
    with TokenStore.open(folder) as store:
        tokens = np.fromfile(folder / "shard-00000.tokens", np.uint16, store.num_tokens, offset=own.HEADER)
        tokens[tokens == EOD] = 1
        tokens[np.cumsum(store.lengths(), dtype=np.int64) - 1] = EOD
    return tokens


def compare_plans(documents: int, budget: int) -> dict[str, float]:
    """Documents per second that best-fit packing plans, ours and TRL's, which also moves the tokens."""
    if importlib.util.find_spec("trl") is None:
        print("trl is not installed, left out")
        return {}
    from datasets import Dataset
    from trl import pack_dataset

    lengths = np.random.default_rng(0).lognormal(5.0, 0.8, documents).clip(8, budget).astype(np.uint32)
    data = Dataset.from_dict({"input_ids": [np.zeros(length, np.uint16) for length in lengths]})
    spent = {"ours": [], "trl": []}
    for _ in range(3):
        spent["ours"].append(_seconds(lambda: _C.plan_packing(lengths, budget)))
        spent["trl"].append(_seconds(lambda: pack_dataset(data, budget, "bfd", {"load_from_cache_file": False})))
    ours, trl = (statistics.median(times) for times in spent.values())
    return {"plan_docs_per_s": documents / ours, "trl_plan_docs_per_s": documents / trl, "ratio_trl_plan": trl / ours}


def _seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="a smaller store and fewer rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, prompts in {"chats": 0.5, "text": 0.0}.items():
            own.build_store(folder / kind, 16_000 if options.quick else 64_000, prompts)
        result = compare(folder, 500 if options.quick else 2000, 3 if options.quick else 5)
    result |= compare_plans(20_000 if options.quick else 100_000, 2048)
    for name, value in result.items():
        print(f"{name:44} {value:16,.3f}")
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
