"""How near exports are to what was trained: next tokens of GGUF files, and logits of merges; SmolLM2-135M by default.

    python benchmarks/exports.py tokens --run runs/lora --data gsm8k/test.jsonl --export gguf-q8_0
    python benchmarks/exports.py merges --data gsm8k/train.jsonl
    python benchmarks/exports.py --quick             # built-in data, both, few prompts

`tokens` exports a trained run, or a model as it is, by `merge`, and reads each file back with transformers. Of the next
tokens that the float32 safetensors merge finds likeliest after the first `--prompts` prompts of the data, and within
them, it counts those that the export finds too. `merges` trains each kind of adapter for two steps, which is enough
for an adapter that is not zero and no measure of training, and says how much the logits of its float32 merge differ.
The last line of stdout is a JSON object: for each export `<form>_same_at_end` and `<form>_same_tokens` (shares),
`<form>_differ_at_end` and `<form>_differ` (counts), and `<form>_largest_margin`, the largest lead in logits over the
second that a token had which another one replaced; for each merge what its merge.json says.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from llamahome.config import Config, ModelSettings
from llamahome.data.prepare import prepare
from llamahome.demo import write_demo_data
from llamahome.model.export import merge_adapter
from llamahome.model.gguf_export import read_gguf
from llamahome.model.load import load_tokenizer
from llamahome.model.quiet import quiet_transformers
from llamahome.model.source import is_adapter, resolve_model
from llamahome.training.checkpoint import model_folder
from llamahome.training.run import train

PARTS = ("tokens", "merges")
EXPORTS = {"bf16": ("safetensors", "bf16"), "gguf-f16": ("gguf-f16", None), "gguf-q8_0": ("gguf-q8_0", None)}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"lora.use_rslora": True},
    "dora": {"lora.use_dora": True},
    "qlora": {"training.method": "qlora"},
}


class Likeliest(NamedTuple):
    """Of every prompt the likeliest next token at each place [tokens], and its lead in logits over the second."""

    tokens: list[torch.Tensor]
    margins: list[torch.Tensor]


def prompts_of(data: str, folder: Path, limit: int) -> list[torch.Tensor]:
    """The token ids of the first samples, each up to its first trained token."""
    tokenizer = load_tokenizer(resolve_model(str(folder), ModelSettings()))
    with prepare(data, tokenizer, config=Config.load(None, {"data.validation_split": 0.0})) as prepared:
        store, found = prepared.train, []
        for ids, trained in islice(map(store.document, range(len(store))), limit):
            found.append(torch.from_numpy(ids[: trained.argmax()].astype("int64")))
    return found


@torch.inference_mode()
def likeliest(model: Any, prompts: list[torch.Tensor]) -> Likeliest:
    found = Likeliest([], [])
    for prompt in prompts:
        top = model(input_ids=prompt[None], use_cache=False).logits[0].topk(2)
        found.tokens.append(top.indices[:, 0].clone())
        found.margins.append(top.values[:, 0] - top.values[:, 1])
    return found


def compare(form: str, found: Likeliest, wanted: Likeliest) -> dict[str, float]:
    other = [ours != theirs for ours, theirs in zip(found.tokens, wanted.tokens, strict=True)]
    ends, places = torch.stack([o[-1] for o in other]), torch.cat(other)
    figures = {
        "same_at_end": 1 - float(ends.double().mean()),
        "differ_at_end": int(ends.sum()),
        "same_tokens": 1 - float(places.double().mean()),
        "differ": int(places.sum()),
        "largest_margin": float((torch.cat(wanted.margins) * places).max()),
    }
    return {f"{form}_{name}": value for name, value in figures.items()}


def read_back(folder: Path) -> Any:
    """What plain transformers makes of an exported folder, in float32."""
    from transformers import AutoModelForCausalLM

    if files := list(folder.glob("*.gguf")):
        return read_gguf(files[0])
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Equal next tokens of every export; a model without adapter is its own reference, and has no bf16 merge."""
    trained = model_folder(Path(args.run)) if args.run else resolve_model(args.model, ModelSettings()).folder
    exports, whole = args.export or list(EXPORTS), trained
    if is_adapter(trained):
        whole = work / "fp32"
        print(merge_adapter(trained, whole, dtype="fp32"))
    else:
        exports = [name for name in exports if name != "bf16"]
    prompts = prompts_of(args.data, whole, args.prompts)
    wanted = likeliest(read_back(whole), prompts)
    figures: dict[str, Any] = {"prompts": len(prompts), "prompt_tokens": sum(map(len, prompts))}
    for name in exports:
        form, dtype = EXPORTS[name]
        report = merge_adapter(trained, work / name, dtype=dtype, form=form)
        print(report)
        figures[f"{name}_relative_difference"] = report.relative_difference
        figures |= compare(name, likeliest(read_back(work / name), prompts), wanted)
    return figures


def merges(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The figures of a float32 merge of each kind of adapter after two steps of four samples."""
    figures: dict[str, Any] = {}
    for name, settings in ADAPTERS.items():
        values = {
            "data.path": args.data,
            "data.max_length": 256,
            "model.name": args.model,
            "training.output": str(work / name),
            "training.eval_samples": 4,
            "optimization.max_steps": 2,
            "optimization.global_batch_size": 4,
            "optimization.learning_rate": 1e-3,
            "optimization.warmup_steps": 0,
            "processing.compile_mode": "none",
            "processing.precision": "fp32",
            "processing.threads": args.threads,
            "monitor.sinks": ["none"],
        }
        train(Config.load(None, values | settings))
        report = merge_adapter(work / name / "final", work / f"{name}-merged", dtype="fp32")
        print(f"{name}: {report}")
        for key in ("relative_difference", "max_absolute_difference", "adapter_effect", "tolerance"):
            figures[f"{name}_{key}"] = getattr(report, key)
    return figures


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            args.data = str(Path(folder, "data.jsonl"))
            write_demo_data(args.data)
        for part in [args.part] if args.part else PARTS:
            figures |= {"tokens": tokens, "merges": merges}[part](args, Path(folder))
    return figures


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS, help="one of them [both]")
    parser.add_argument("--run", help="run folder or adapter to export [the model as it is]")
    parser.add_argument("--model", help="model folder, GGUF file or hub id [the embedded SmolLM2-135M]")
    parser.add_argument("--data", help="held-out samples [built-in examples]")
    parser.add_argument("--export", action="append", choices=EXPORTS, help="one of the exports [each]")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="8 prompts")
    args = parser.parse_args(words)
    if args.quick:
        args.prompts = 8
    figures = measure(args)
    for name, value in figures.items():
        print(f"{name:36} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
