"""Preparation: our rate beside the bare tokenizers batch call and `datasets.map`, and the packing plan.

    python benchmarks/prepare.py                        # the embedded SmolLM2's tokenizer on built-in text
    python benchmarks/prepare.py --model M --data F     # any model folder and JSON Lines file of `messages`

Ours reads, checks, renders, tokenises, marks what is trained and writes a checksummed store; `datasets.map` reads,
renders, tokenises (the faster of one process and one per core) and writes Arrow, with no marks; the bare call gets
rendered texts in memory and keeps nothing. Sides take turns; the median counts. `cpu_ratio_tokenizers` compares
processor time, `steady_ratio` the tokens per processor second of our last quarter with those of the first. The last
line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
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


def ours(path: Path, tokenizer: Any, folder: Path) -> tuple[int, float]:
    """Tokens, and how the rate of the last quarter compares with that of the first."""
    settings = {"data.max_length": 1 << 20, "data.validation_split": 0.0}
    seen: list[tuple[int, float]] = []

    def show(progress: Progress) -> None:
        seen.append((progress.tokens, time.process_time()))

    report = prepare_folder(path, tokenizer, folder, config=Config.load(None, settings), show=show)
    quarter = max(1, (len(seen) - 1) // 4)
    first, last = rate(seen[: quarter + 1]), rate(seen[-quarter - 1 :])
    return report.train.tokens, last / first if first else 1.0


def rate(seen: list[tuple[int, float]]) -> float:
    (tokens, began), (more, ended) = seen[0], seen[-1]
    return (more - tokens) / (ended - began) if ended > began else 0.0


def with_datasets(path: Path, tokenizer: Any, folder: Path, processes: int) -> int:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))

    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(batch["messages"], tokenize=True)["input_ids"]}

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
        rows = write_rows(source, folder / "rows.jsonl", 2 if args.quick else 10)
        figures = compare(folder, tokenizer, 3 if args.quick else 7)
    speed, fill = measure_packing(200_000 if args.quick else 2_000_000)
    figures |= {"rows": rows, "packing_docs_per_s": speed, "packing_fill": fill}
    if not args.json:
        for key, value in figures.items():
            print(f"{key:22} {value:,.4g}")
    print(json.dumps(figures))


def compare(folder: Path, tokenizer: Any, rounds: int) -> dict[str, float]:
    path = folder / "rows.jsonl"
    with path.open(encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in file]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    del chats
    spent: dict[str, list[float]] = {"ours": [], "tokenizers": [], "map": [], "map of many": []}
    cpu: dict[str, list[float]] = {"ours": [], "tokenizers": []}
    tokens, steady = 0, []
    cores = len(os.sched_getaffinity(0))
    for turn in range(rounds):
        for side, times in spent.items():
            place = folder / f"{side}-{turn}"
            start, start_cpu = time.perf_counter(), time.process_time()
            match side:
                case "ours":
                    tokens, ratio = ours(path, tokenizer, place)
                    steady.append(ratio)
                case "tokenizers":
                    bare(texts, tokenizer)
                case "map":
                    with_datasets(path, tokenizer, place, 1)
                case _:
                    with_datasets(path, tokenizer, place, cores)
            times.append(time.perf_counter() - start)
            if side in cpu:
                cpu[side].append(time.process_time() - start_cpu)
    median = {side: statistics.median(times) for side, times in spent.items()}
    return {
        "ratio_tokenizers": median["tokenizers"] / median["ours"],
        "cpu_ratio_tokenizers": statistics.median(cpu["tokenizers"]) / statistics.median(cpu["ours"]),
        "steady_ratio": statistics.median(steady),
        "ratio_datasets_map": min(median["map"], median["map of many"]) / median["ours"],
        "tokens_per_s": tokens / median["ours"],
        "seconds_ours": median["ours"],
        "seconds_tokenizers": median["tokenizers"],
        "seconds_map": median["map"],
        "seconds_map_processes": median["map of many"],
        "cores": cores,
    }


if __name__ == "__main__":
    main()
