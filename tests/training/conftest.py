"""A tiny model with an adapter, and a store of random samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamahome.config import Config
from llamahome.data.store import TokenStoreWriter
from llamahome.model.adapters import apply_adapter
from llamahome.model.load import load_model, resolve_model

VOCABULARY = 512


@pytest.fixture(scope="session")
def make_model(tiny_model_dir):
    """Build the tiny model: make_model(dtype=..., attention=..., **overrides)."""

    def make(dtype=torch.float32, attention="llamahome", **overrides):
        config = Config.load(None, {"model.name": str(tiny_model_dir), "lora.rank": 4, **overrides})
        source = resolve_model(config.model.name, config.model)
        nf4 = config.training.method == "qlora"
        base = load_model(source, dtype=dtype, device="cpu", attention=attention, nf4=nf4)
        model = apply_adapter(base, config)
        if not config.trains_base:
            # PEFT begins with B = 0, where A has no gradient at all.
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return model

    return make


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """40 samples of 2 to 60 tokens, about two thirds of them trained."""
    random = np.random.default_rng(7)
    with TokenStoreWriter(tmp_path_factory.mktemp("samples") / "store", VOCABULARY) as writer:
        for number in range(40):
            length = int(random.integers(2, 60))
            trained = random.random(length) < 0.66
            trained[-1] = True
            writer.append(random.integers(0, VOCABULARY, length), trained, number)
        return writer.commit()


@pytest.fixture
def data_file(tmp_path):
    """60 rows of instructions with short answers."""
    import json

    path = tmp_path / "rows.jsonl"
    words = ["sea", "mill", "river", "stone", "fox", "train", "rain", "home", "station", "dog"]
    rows = [
        {"instruction": f"Write about the {words[i % 10]} number {i}.", "output": " ".join(words[: 2 + i % 7])}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(tiny_model_dir, data_file, tmp_path):
    """Overrides for a quick run of 12 steps of 4 samples in fp32, saved every 3 steps."""
    return {
        "model.name": str(tiny_model_dir),
        "data.path": str(data_file),
        "training.output": str(tmp_path / "run"),
        "processing.precision": "fp32",
        "processing.compile_mode": "none",
        "processing.threads": 1,
        "optimization.max_steps": 12,
        "optimization.global_batch_size": 4,
        "optimization.learning_rate": 1e-3,
        "training.save_steps": 3,
        "lora.rank": 4,
        "monitor.sinks": [],
    }
