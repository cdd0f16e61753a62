"""From an event loop: the synchronous core's bits, one epoch at a time, and a cancellation that saves."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from llamahome.aio import Worker, checkpoint_in
from llamahome.config import Config
from llamahome.data.batch import BatchProcessor
from llamahome.data.dataset import StepOrder
from llamahome.data.prepare import prepare
from llamahome.errors import UsageError
from llamahome.training.checkpoint import TrainingState
from llamahome.training.extensions import Extensions
from llamahome.training.loop import TrainingLoop
from llamahome.training.run import train
from llamahome.training.step import StepBatches

ROWS = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."} for i in range(40)]


@pytest.fixture
def make_loop(tiny_model_dir: Path, tiny_tokenizer: Any) -> Any:
    """A loop of 10 steps an epoch over a fresh model."""
    from transformers import AutoModelForCausalLM

    def make(steps: int = 10) -> TrainingLoop:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        store = prepare(ROWS, tiny_tokenizer, config=Config.load(None, {"data.validation_split": 0.0})).train
        batches = StepBatches(store, StepOrder(len(store), 4, seed=1), BatchProcessor(store), 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return TrainingLoop(model, optimizer, batches, state=TrainingState(total_steps=steps))

    return make


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {
        "model.name": str(tiny_model_dir), "training.output": str(tmp_path / "run"), "processing.precision": "fp32",
        "processing.compile_mode": "none", "processing.threads": 1, "optimization.global_batch_size": 4,
        "optimization.max_steps": 6, "monitor.sinks": [], "data.validation_split": 0.0,
    }  # fmt: skip


def test_losses_are_the_synchronous_ones_bit_for_bit(make_loop: Any) -> None:
    """The event loop's own gradient mode and autocast, set across awaits, reach nothing."""
    expected = [record["loss"] for record in make_loop()]

    async def main() -> list[float]:
        async with Worker() as worker:
            loop = await worker.call(make_loop)
            losses = []
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                async for record in worker.steps(loop):
                    losses.append(record["loss"])
                    await asyncio.sleep(0)
            return losses

    assert asyncio.run(main()) == expected


def test_an_epoch_is_awaited_and_sums_up(make_loop: Any, tiny_tokenizer: Any) -> None:
    records = list(make_loop())

    async def main() -> tuple[dict[str, float], dict[str, float], int]:
        async with Worker() as worker:
            data = await worker.load_data(ROWS, tiny_tokenizer, Config.load(None, {"data.validation_split": 0.0}))
            loop = make_loop(13)
            first = await worker.train_epoch(loop)
            return first, await worker.train_epoch(loop), len(data.train)

    first, second, samples = asyncio.run(main())
    trained = sum(record["trained_tokens"] for record in records)
    assert samples == 40
    assert (first["steps"], second["steps"]) == (10, 3)
    assert first["loss"] == sum(r["loss"] * r["trained_tokens"] for r in records) / trained
    assert first["tokens"] == sum(record["tokens"] for record in records)


def test_torch_runs_in_one_thread_and_never_two_epochs_at_once(make_loop: Any) -> None:
    async def main() -> set[str]:
        threads = set()
        async with Worker() as worker:
            loop = make_loop()
            seen = loop.run_step
            loop.run_step = lambda: threads.add(threading.current_thread().name) or seen()
            one = asyncio.create_task(worker.train_epoch(loop))
            await asyncio.sleep(0)
            with pytest.raises(UsageError, match="trains already"):
                await worker.train_epoch(loop)
            assert (await one)["steps"] == 10
        return threads

    (name,) = asyncio.run(main())
    assert name.startswith("llamahome")


def test_a_slow_reader_makes_training_wait(make_loop: Any) -> None:
    async def main() -> int:
        async with Worker(buffer=2) as worker:
            loop = make_loop()
            async with aclosing(worker.steps(loop)) as records:
                await anext(records)
                await asyncio.sleep(1.0)
                return loop.state.step

    assert asyncio.run(main()) <= 5  # one read, two in the buffer, one that waits, one under way


def test_cancellation_saves_and_then_raises(make_loop: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    async def main() -> int:
        async with Worker(buffer=1) as worker:
            loop = make_loop()
            task = asyncio.create_task(worker.train_epoch(loop, save=checkpoint_in(tmp_path, tiny_tokenizer)))
            while loop.state.step < 3:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            step = loop.state.step
            assert (await worker.train_epoch(loop))["steps"] == 10 - step, "the worker is free again"
            return step

    step = asyncio.run(main())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert (tmp_path / f"checkpoint-{step}" / "manifest.json").exists()


def test_a_whole_run_and_its_cancellation(settings: dict[str, Any], tmp_path: Path) -> None:
    own = Extensions(data=ROWS)
    whole = train(Config.load(None, settings), own)
    lines = [json.loads(line) for line in (whole.output / "metrics.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if "event" not in line]

    async def main(output: Path, stop_after: int) -> list[float]:
        losses: list[float] = []
        config = Config.load(None, {**settings, "training.output": str(output)})
        async with Worker(buffer=1) as worker, aclosing(worker.train(config, own)) as records:
            async for record in records:
                losses.append(record["loss"])
                if len(losses) == stop_after:
                    break
        return losses

    assert asyncio.run(main(tmp_path / "async", 0)) == expected
    assert asyncio.run(main(tmp_path / "stopped", 2)) == expected[:2]
    status = json.loads((tmp_path / "stopped" / "status.json").read_text())
    assert (status["state"], status["code"], status["resumable"]) == ("stopped", 130, True)
    assert 2 <= status["last_step"] < 6


def test_an_error_of_the_loop_is_raised_where_it_is_awaited(make_loop: Any) -> None:
    async def main() -> None:
        async with Worker() as worker:
            loop = make_loop()
            with torch.no_grad():
                next(iter(loop.model.parameters())).fill_(float("nan"))
            await worker.train_epoch(loop)

    with pytest.raises(Exception, match="loss nan"):
        asyncio.run(main())
