"""Preparation: our rate beside the bare tokenizers batch call and `datasets.map`, and the packing plan.

    python benchmarks/prepare.py                        # the embedded SmolLM2's tokenizer on built-in text
    python benchmarks/prepare.py --model M --data F     # any model folder and JSON Lines file of `messages`
    python benchmarks/prepare.py --data F --gigabytes 2 # one large file: peak memory, first and last rate

Ours reads, checks, renders, tokenises, marks what is trained and writes a checksummed store. `datasets.map` reads,
renders, tokenises, marks (the usual way: the prompt is rendered and tokenised, too) and writes Arrow, in one process or
one per core, whichever is faster; `_unmarked` leaves the marks out. The bare call gets rendered texts in memory and
keeps nothing. Sides take turns; ratios are medians over the rounds, `cpu_` of processor time. The last line of stdout
is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from llamahome import _C
from llamahome.config import Config
from llamahome.data.prepare import prepare_folder
from llamahome.data.progress import Progress
from llamahome.demo import write_demo_data
from llamahome.model.load import load_tokenizer, resolve_model

BATCH = 1000
SETTINGS = {"data.max_length": 1 << 20, "data.validation_split": 0.0}
PACKED_LENGTH = 2048


def write_rows(source: Path, path: Path, copies: int) -> int:
    """The rows of `source` and copies of them with shuffled words, so that no tokenizer cache has seen whole texts."""
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file if line.strip()]
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for messages in rows:
                if copy:
                    messages = [message | {"content": shuffled(message["content"], copy)} for message in messages]
                file.write(json.dumps({"messages": messages}) + "\n")
    return copies * len(rows)


def shuffled(text: str, seed: int) -> str:
    words = text.split(" ")
    random.Random(seed).shuffle(words)
    return " ".join(words)


def ours(path: Path, tokenizer: Any, folder: Path) -> int:
    """Tokens."""
    return prepare_folder(path, tokenizer, folder, config=Config.load(None, SETTINGS)).train.tokens


def with_datasets(path: Path, tokenizer: Any, folder: Path, processes: int, mark: bool) -> int:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))

    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer.apply_chat_template(batch["messages"], tokenize=True)["input_ids"]
        if not mark:
            return {"input_ids": ids}
        asked = [messages[:-1] for messages in batch["messages"]]
        prompts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)["input_ids"]
        marks = [[0] * len(one) + [1] * (len(all_) - len(one)) for one, all_ in zip(prompts, ids, strict=True)]
        return {"input_ids": ids, "completion_mask": marks}

    count = processes if processes > 1 else None
    tokens = rows.map(tokenise, batched=True, num_proc=count, remove_columns=["messages"], load_from_cache_file=False)
    return len(tokens)


def bare(texts: list[str], tokenizer: Any) -> None:
    for start in range(0, len(texts), BATCH):
        tokenizer.backend_tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_packing(documents: int) -> tuple[float, float]:
    """Documents planned per second and the share of the rows that they fill; lengths as of instruction data."""
    lengths = np.random.default_rng(0).lognormal(5.0, 0.8, documents).clip(8, PACKED_LENGTH).astype(np.uint32)
    spent = min(seconds(lambda: _C.plan_packing(lengths, PACKED_LENGTH)) for _ in range(5))
    _, bounds = _C.plan_packing(lengths, PACKED_LENGTH)
    return documents / spent, float(lengths.sum()) / ((len(bounds) - 1) * PACKED_LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder, GGUF file or hub id")
    parser.add_argument("--data", type=Path, help="JSON Lines file of messages")
    parser.add_argument("--copies", type=int, default=10, help="how often the rows are there, with shuffled words")
    parser.add_argument("--gigabytes", type=float, help="prepare one file of this size, and nothing else")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--quick", action="store_true", help="less data, in under a minute")
    args = parser.parse_args()
    config = Config()
    tokenizer = load_tokenizer(resolve_model(args.model, config.model))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = args.data or folder / "demo.jsonl"
        if args.data is None:
            write_demo_data(source)
        rows = write_rows(source, folder / "rows.jsonl", 2 if args.quick else args.copies)
        if args.gigabytes:
            figures = large(source, tokenizer, folder, args.gigabytes)
        else:
            figures = compare(folder, tokenizer, 3 if args.quick else 7)
    speed, fill = measure_packing(200_000 if args.quick else 2_000_000)
    figures |= {"rows": rows, "packing_docs_per_s": speed, "packing_fill": fill}
    if not args.json:
        for key, value in figures.items():
            print(f"{key:32} {value:,.4g}")
    print(json.dumps(figures))


def compare(folder: Path, tokenizer: Any, rounds: int) -> dict[str, float]:
    path = folder / "rows.jsonl"
    with path.open(encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in file]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    del chats
    cores = len(os.sched_getaffinity(0))
    sides: dict[str, Callable[[Path], object]] = {
        "ours": lambda place: ours(path, tokenizer, place),
        "tokenizers": lambda _: bare(texts, tokenizer),
        "map": lambda place: with_datasets(path, tokenizer, place, 1, mark=True),
        "map_processes": lambda place: with_datasets(path, tokenizer, place, cores, mark=True),
        "map_unmarked": lambda place: with_datasets(path, tokenizer, place, 1, mark=False),
    }
    tokens = ours(path, tokenizer, folder / "warm")
    wall: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side, work in sides.items():
            begun, begun_cpu = time.perf_counter(), processor_seconds()
            work(folder / f"{side}-{turn}")
            wall[side].append(time.perf_counter() - begun)
            cpu[side].append(processor_seconds() - begun_cpu)
            shutil.rmtree(folder / f"{side}-{turn}", ignore_errors=True)
    return {
        "ratio_tokenizers": ratio(wall, "tokenizers"),
        "cpu_ratio_tokenizers": ratio(cpu, "tokenizers"),
        "ratio_datasets_map": min(ratio(wall, "map"), ratio(wall, "map_processes")),
        "cpu_ratio_datasets_map": min(ratio(cpu, "map"), ratio(cpu, "map_processes")),
        "ratio_datasets_map_unmarked": ratio(wall, "map_unmarked"),
        "cpu_ratio_datasets_map_unmarked": ratio(cpu, "map_unmarked"),
        "tokens_per_s": tokens / statistics.median(wall["ours"]),
        **{f"seconds_{side}": statistics.median(times) for side, times in wall.items()},
        "cores": cores,
    }


def ratio(spent: dict[str, list[float]], side: str) -> float:
    return statistics.median(theirs / own for theirs, own in zip(spent[side], spent["ours"], strict=True))


def processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(os.times()[:4])


def large(source: Path, tokenizer: Any, folder: Path, gigabytes: float) -> dict[str, float]:
    """One preparation of a large file: peak resident memory, and tokens per processor second of its first and last
    tenth (at most a gigabyte)."""
    path = folder / "large.jsonl"
    write_rows(source, path, math.ceil(gigabytes * 1e9 / source.stat().st_size))
    seen: list[tuple[float, int, float]] = []

    def show(progress: Progress) -> None:
        seen.append((progress.done_bytes, progress.tokens, time.process_time()))

    before = peak_bytes()
    prepare_folder(path, tokenizer, folder / "large", config=Config.load(None, SETTINGS), show=show)
    size = path.stat().st_size
    part = min(1e9, size / 10)
    first = [item for item in seen if item[0] <= part]
    last = [item for item in seen if item[0] >= size - part]
    return {
        "large_gigabytes": size / 1e9,
        "large_peak_mb": peak_bytes() / 1e6,
        "large_peak_before_mb": before / 1e6,
        "large_last_to_first_rate": rate(last) / rate(first),
        "large_tokens_per_s": seen[-1][1] / (seen[-1][2] - seen[0][2]),
    }


def rate(seen: Sequence[tuple[float, int, float]]) -> float:
    return (seen[-1][1] - seen[0][1]) / (seen[-1][2] - seen[0][2])


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
