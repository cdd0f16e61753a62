"""Fixtures that every test may use: an isolated home and a tiny but real model folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# transformers and huggingface_hub read it once, when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors: a second thread only waits, and badly so beside other processes.
os.environ["OMP_NUM_THREADS"] = "1"

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TINY_VOCAB_SIZE = 512
RELIABILITY = Path(__file__).parents[1] / "docs" / "reliability.md"
COUNTED = ("kills", "failing calls", "corruptions")  # what tests record with record_property

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. A river runs past the old mill, and nobody has counted the stones.",
    "Question: what is two plus two? Answer: two plus two is four, because adding two and two gives four.",
    "user assistant system\nYou are a helpful assistant. Write a short story about the sea.",
    "def add(left: int, right: int) -> int:\n    return left + right\n",
    "Le garçon a mangé une pêche à 12:30, 3.14 € — naïve café, straße, 東京, Привет.",
    "It was raining when she left the station; the train had been late again, so she walked home in the dark.",
)


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Home and caches inside the test's own folder; no network, no colours."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LLAMAHOME_CACHE", str(home / "cache"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    return home


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 512 tokens and a ChatML template; <|im_end|> ends a turn, <|endoftext|> begins and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    assert bpe.get_vocab_size() == TINY_VOCAB_SIZE
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved random 2-layer Llama (fp32, tied embeddings) and its tokenizer. Copy the folder to change it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def matrix() -> dict[int, set[str]]:
    """Row of the fault matrix -> the tests that stand in it; a quoted name is a case of the wrong inputs."""
    rows = {}
    for number, cells in re.findall(r"^\| (\d+) \|(.*)\|$", RELIABILITY.read_text(), re.MULTILINE):
        cases = (
            f"tests/test_wrong_inputs.py::test_one_line_names_the_place[{name}]"
            for name in re.findall(r'"(.+?)"', cells)
        )
        rows[int(number)] = {*re.findall(r"`(tests/[\w/.]+::[\w:]+)`", cells), *cases}
    return rows


@pytest.fixture(name="matrix", scope="session")
def matrix_fixture() -> dict[int, set[str]]:
    return matrix()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many faults of the matrix, kills and damages this run has tried.

    Here and not beside them: of tests on several processes the first one, which reports, loads only this file.
    """
    named = set().union(*matrix().values())
    reports = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    faults = sum(report.nodeid in named or report.nodeid.partition("[")[0] in named for report in reports)
    counts: Counter[str] = Counter()
    for report in reports:
        for name, value in report.user_properties:
            if name in COUNTED:
                counts[name] += value
    said = ", ".join(f"{counts[name]} {name}" for name in COUNTED)
    terminalreporter.write_line(f"fault matrix: {faults} faults injected and survived; {said}")
