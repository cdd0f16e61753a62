"""The token reader against a plain torch loop over the same mapped file, and against what the memory allows.

Warm figures are per second of the reading thread's CPU time, so that other programs on the machine do not count; each
is the best of some rounds, taken in turn with what it is compared with. Cold figures are wall-clock. Run:

    python benchmarks/reader.py [--quick] [--json] [--folder DIR]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from llamahome import _C
from llamahome.data.batch import BatchProcessor
from llamahome.data.dataset import StepOrder, StreamingDataset
from llamahome.data.store import TokenStore, TokenStoreWriter

ROWS, WIDTH = 8, 2048
VOCAB_SIZE = 49152
BUDGET = 16384  # tokens of a packed row
STEP = 256  # documents of a step
LOOK_AHEAD = 4096  # rows
HEADER = 4096  # bytes before the tokens of a shard
LIMIT_SOURCE = Path(__file__).parents[1] / "csrc" / "bench" / "gather_limit.cpp"


def build_store(folder: Path, documents: int, prompts: float) -> None:
    """Lognormal documents of 517 tokens on average; up to the share `prompts` at the start of each is not trained."""
    random = np.random.default_rng(0)
    with TokenStoreWriter(folder, VOCAB_SIZE, shard_bytes=1 << 40) as writer:
        for begin in range(0, documents, 4096):
            lengths = np.clip(random.lognormal(5.75, 1, min(4096, documents - begin)), 8, 8192).astype(np.int64)
            ids = random.integers(0, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint32)
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            prompt = np.repeat((lengths * random.random(len(lengths)) * prompts).astype(np.int64), lengths)
            trained = np.arange(len(ids)) - starts >= prompt
            writer.append_many(ids, trained, lengths, np.arange(begin, begin + len(lengths)))
        writer.commit().close()


def rate(read: Callable[[], int], clock: Callable[[], float] = time.thread_time) -> float:
    """Million tokens per second of one call."""
    begin = clock()
    return read() / (clock() - begin) / 1e6


def fixed_reused(store: TokenStore, rows: np.ndarray) -> int:
    ids, labels = np.empty((2, ROWS, WIDTH), np.int64)
    for begin in range(0, len(rows), ROWS):
        store.rows(rows[begin : begin + ROWS], ids, labels)
    return rows.size * WIDTH


def fixed_fresh(store: TokenStore, rows: np.ndarray) -> int:
    for begin in range(0, len(rows), ROWS):
        ids = torch.empty(ROWS, WIDTH, dtype=torch.int64)
        labels = torch.empty(ROWS, WIDTH, dtype=torch.int64)
        store.rows(rows[begin : begin + ROWS], ids, labels)
    return rows.size * WIDTH


def torch_loop(tokens: torch.Tensor, rows: np.ndarray) -> int:
    for begin in range(0, len(rows), ROWS):
        starts = (HEADER // 2 + rows[begin : begin + ROWS] * WIDTH).tolist()
        ids = torch.stack([tokens[start : start + WIDTH].to(torch.int64) for start in starts])
        ids.clone()  # the labels
    return rows.size * WIDTH


def packed(store: TokenStore, epoch: int) -> int:
    """A whole epoch as the training loop reads it: order, cut, gather; into reused buffers."""
    order, processor = StepOrder(len(store), STEP, seed=1), BatchProcessor(store)
    ids, labels, positions = np.empty((3, BUDGET), np.int64)
    bounds, total = np.empty(STEP + 1, np.int32), 0
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        samples = order.samples(step)
        for group in processor.cut(samples, token_budget=BUDGET):
            tokens = int(store.lengths(group).sum())
            store.pack(group, ids[:tokens], labels[:tokens], positions[:tokens], bounds[: len(group) + 1])
            total += tokens
    return total


def gather_limit(shard: Path, folder: Path) -> float:
    """What a C++ program reaches that does nothing but widen random rows; NaN without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return float("nan")
    program = folder / "gather_limit"
    if not program.exists():
        command = [compiler, "-std=c++20", "-O3", "-march=native", str(LIMIT_SOURCE), "-o", str(program)]
        subprocess.run(command, check=True)
    output = subprocess.run(
        [program, str(shard), str(WIDTH), str(ROWS), "0.3"], check=True, capture_output=True, text=True
    ).stdout
    return float(output.split()[0]) / 1e6


def warm(folder: Path, rounds: int, batches: int) -> dict[str, float]:
    shard = folder / "text" / "shard-00000.tokens"
    store, chats = TokenStore.open(folder / "text"), TokenStore.open(folder / "chats")
    tokens = torch.from_file(str(shard), shared=True, size=HEADER // 2 + store.num_tokens, dtype=torch.uint16)
    rows = np.random.default_rng(1).integers(0, store.num_tokens // WIDTH, batches * ROWS)
    best: dict[str, float] = {}
    packed(chats, 0)  # maps every page and checks every block once
    torch_loop(tokens, np.arange(store.num_tokens // WIDTH))
    fixed_reused(store, np.arange(store.num_tokens // WIDTH // ROWS * ROWS))
    for epoch in range(1, rounds + 1):
        for name, value in {
            "limit": gather_limit(shard, folder),
            "fixed": rate(lambda: fixed_reused(store, rows)),
            "torch_loop": rate(lambda: torch_loop(tokens, rows)),
            "fresh": rate(lambda: fixed_fresh(store, rows)),
            "packed": rate(lambda epoch=epoch: packed(chats, epoch)),
        }.items():
            best[name] = max(best.get(name, 0), value)
    return {
        "packed_mtokens_per_s": best["packed"],
        "fixed_mtokens_per_s": best["fixed"],
        "fixed_fresh_mtokens_per_s": best["fresh"],
        "torch_loop_mtokens_per_s": best["torch_loop"],
        "gather_limit_mtokens_per_s": best["limit"],
        "ratio_torch_loop": best["fresh"] / best["torch_loop"],
        "limit_share": best["fixed"] / best["limit"],
    }


def evict(path: Path) -> float:
    """Drop a file from the page cache; returns the share of its pages that is still there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = path.stat().st_size
        pages = -(-size // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        address = libc.mmap(
            None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0)
        )
        libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident)
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(byte & 1 for byte in bytes(resident)) / pages


def bytes_read() -> int:
    """What this process made the disk read."""
    text = Path("/proc/self/io").read_text()
    return int(dict(line.split(": ") for line in text.splitlines())["read_bytes"])


def cold(folder: Path, items: int, rounds: int) -> dict[str, float]:
    """Shuffled rows from a store that is not in memory, and the bare disk in turn; wall clock, medians."""
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        path = folder / "text" / "shard-00000.tokens"
        found.append({"cold_resident_share": evict(path)} | cold_rows(folder, items))
        found[-1] |= {"disk_random_mb_per_s": disk(path, items), "disk_sequential_mb_per_s": disk(path, 0)}
        found[-1] |= larger_than_cache(folder, items)
        bytes_per_s = found[-1]["cold_mtokens_per_s"] * 2 * found[-1]["read_amplification"]
        found[-1]["cold_disk_share"] = bytes_per_s / found[-1]["disk_random_mb_per_s"]
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def cold_rows(folder: Path, items: int) -> dict[str, float]:
    """Fixed rows as a dataset gives them."""
    dataset = StreamingDataset(TokenStore.open(folder / "text"), rows="fixed", length=WIDTH, read_ahead=LOOK_AHEAD)
    before, begin = bytes_read(), time.perf_counter()
    count = sum(1 for _, _ in zip(range(items), dataset, strict=False))
    seconds, read = time.perf_counter() - begin, bytes_read() - before
    return {
        "cold_mtokens_per_s": count * WIDTH / seconds / 1e6,
        "read_amplification": read / (count * WIDTH * 2),
    }


def larger_than_cache(folder: Path, items: int) -> dict[str, float]:
    """The same for a store that memory cannot hold: what has been read is dropped behind the reader, which goes round
    twice and finds nothing of the first round in the second. Without a map, as runs read: mapped pages stay."""
    path = folder / "text" / "shard-00000.tokens"
    evict(path)
    store = TokenStore.open(folder / "text", mapped=False)
    dataset = StreamingDataset(store, rows="fixed", length=WIDTH, read_ahead=LOOK_AHEAD, shuffle=True)
    before, begin, count, dropping = bytes_read(), time.perf_counter(), 0, 0.0
    with path.open("rb") as file:
        for epoch in range(2):
            rows = StepOrder(store.num_rows(WIDTH), 1, 42).range(epoch, 0, items)
            for i, _ in zip(range(len(rows)), dataset, strict=False):
                if (i + 1) % 1024 == 0 or i + 1 == len(rows):
                    start = time.perf_counter()
                    for row in rows[i // 1024 * 1024 : i + 1].tolist():
                        os.posix_fadvise(file.fileno(), HEADER + row * WIDTH * 2, WIDTH * 2, os.POSIX_FADV_DONTNEED)
                    dropping += time.perf_counter() - start
            count += len(rows)
            dataset.set_epoch(epoch + 1)
    seconds, read = time.perf_counter() - begin - dropping, bytes_read() - before
    return {
        "larger_than_cache_mtokens_per_s": count * WIDTH / seconds / 1e6,
        "larger_than_cache_amplification": read / (count * WIDTH * 2),
    }


def disk(path: Path, rows: int) -> float:
    """Megabytes per second of the disk itself: random rows with the same look-ahead, or with rows = 0 in sequence."""
    evict(path)
    size, row = path.stat().st_size, WIDTH * 2
    places = [i * (1 << 20) for i in range(size >> 20)]
    if rows:
        places = (np.random.default_rng(2).permutation(size // row - 1)[:rows] * row).tolist()
        size_of_one = row
    else:
        size_of_one = 1 << 20
    begin, total = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        for i, place in enumerate(places):
            if rows and i % 1024 == 0:
                for later in places[i + LOOK_AHEAD if i else 0 : i + LOOK_AHEAD + 1024]:
                    os.posix_fadvise(file.fileno(), later, size_of_one, os.POSIX_FADV_WILLNEED)
            total += len(os.pread(file.fileno(), size_of_one, place))
    return total / (time.perf_counter() - begin) / 1e6


def first_batch(folder: Path) -> float:
    """Milliseconds from opening to the first packed batch; the median of 9."""
    times = []
    for seed in range(9):
        begin = time.perf_counter()
        store = TokenStore.open(folder / "chats")
        BatchProcessor(store).build(StepOrder(len(store), 16, seed).samples(0))
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times)[4]


def private_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def private_memory(folder: Path) -> float:
    """MB of private memory that opening and an epoch of packed reading add, in a process of its own."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import reader, pathlib; store_type = reader.TokenStore\n"
        "before = reader.private_bytes(); store = store_type.open(pathlib.Path(sys.argv[2]) / 'chats')\n"
        "reader.packed(store, 0); print(reader.private_bytes() - before)"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e6


def packing_plan(store: TokenStore) -> dict[str, float]:
    lengths = store.lengths()
    rates = [rate(lambda: len(_C.plan_packing(lengths, BUDGET)[0])) for _ in range(5)]
    bounds = _C.plan_packing(lengths, BUDGET)[1]
    return {
        "packing_docs_per_s": max(rates) * 1e6,
        "packing_fill": int(lengths.sum(dtype=np.int64)) / ((len(bounds) - 1) * BUDGET),
    }


def measure(folder: Path, quick: bool) -> dict[str, float]:
    documents = 64_000 if quick else 512_000
    for name, prompts in {"chats": 0.5, "text": 0.0}.items():
        if not (folder / name).exists():
            build_store(folder / name, documents, prompts)
    torch.set_num_threads(1)
    result = warm(folder, rounds=3 if quick else 5, batches=2000 if quick else 10_000)
    result |= {"first_batch_ms": first_batch(folder), "private_mb": private_memory(folder)}
    with TokenStore.open(folder / "chats") as store:
        result |= packing_plan(store) | {"documents": len(store), "tokens": store.num_tokens}
    return result | cold(folder, 4000 if quick else 40_000, 3 if quick else 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="a smaller store and fewer rounds")
    parser.add_argument("--folder", type=Path, help="keep the store here and use it again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, options.quick)
    for name, value in result.items():
        print(f"{name:28} {value:16,.3f}")
    if options.json:
        print(json.dumps({name: None if value != value else round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
