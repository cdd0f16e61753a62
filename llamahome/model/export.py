"""Models and adapters written so that plain transformers and PEFT load them, and merges that are proved."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llamahome.config import ModelSettings
from llamahome.errors import ModelError, UsageError
from llamahome.files import publish_folder, write_json
from llamahome.model.adapters import BASE_RECORD, adapter_state, read_adapter, scheme_in
from llamahome.model.card import model_card
from llamahome.model.checks import model_fingerprint, read_json
from llamahome.model.fake_quant import fix_rounding, record_of, switch
from llamahome.model.gguf_export import Kind, read_gguf, write_gguf
from llamahome.model.load import load_model, load_trained, source_of
from llamahome.model.quantize import NF4, quantized_layers
from llamahome.model.quiet import quiet_transformers
from llamahome.model.source import ModelSource, is_adapter
from llamahome.model.torchao_export import read_converted, write_converted

if TYPE_CHECKING:
    import torch

Form = Literal["safetensors", "gguf-f16", "gguf-q8_0", "torchao"]
PROBES = (
    "The river rises in the hills and runs for two hundred miles to the sea.",
    "Question: what is 17 plus 25? Answer: 17 + 25 = 42.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    "Il était une fois, dans un village au bord de la forêt, un meunier qui avait trois fils.",
)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Largest |difference| / |logits| (Frobenius) that rounding the merged weights to the dtype explains.
TOLERANCES = {
    "float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2, "f16": 5e-3, "q8_0": 5e-2, "torchao": 1e-4,
}  # fmt: skip
_LOST = 0.5  # a merge whose error is above this share of what the adapter does has lost the adapter


@dataclass(frozen=True)
class MergeReport:
    """How the merged model's logits on the probes differ from the adapter model's; all in float32 arithmetic.

    `relative_difference` is |merged - adapter| / |adapter| and `adapter_effect` |base - adapter| / |adapter|, None
    for a model without adapter. `dtype` is that of the files: a torch type, a GGUF type or "torchao".
    """

    dtype: str
    relative_difference: float
    max_absolute_difference: float
    adapter_effect: float | None
    tolerance: float
    probe_tokens: int

    def __str__(self) -> str:
        whose = "trained model" if self.adapter_effect is None else "adapter"
        text = (
            f"merged in {self.dtype}: logits on {self.probe_tokens} probe tokens differ from the {whose}'s by "
            f"{self.relative_difference:.1e} (at most {self.tolerance:.0e})"
        )
        return text if self.adapter_effect is None else f"{text}; the adapter changes them by {self.adapter_effect:.1e}"


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write into an existing folder: PEFT's layout for an adapter, else transformers', and the tokenizer."""
    if hasattr(model, "peft_config"):
        write_adapter(model, folder)
    else:
        with quiet_transformers():
            model.save_pretrained(folder)
        if (scheme := record_of(model)) is not None:
            write_json(folder / BASE_RECORD, {"qat": scheme})
    write_tokenizer(tokenizer, folder)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer's files, into an existing folder."""
    if getattr(tokenizer, "is_fast", False):  # else the last call's truncation is saved for every later user
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Put a model or adapter in `folder`, complete or not at all; what was there is replaced. Raises: StorageError."""
    with publish_folder(Path(folder)) as temporary:
        write_model(model, tokenizer, temporary)


def write_adapter(model: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """The adapter in PEFT's layout; `weights` stand in for the model's, where a rank has only parts of them."""
    # Not PEFT's save_pretrained: it writes a model card and may ask the hub.
    from safetensors.torch import save_file

    settings = copy.copy(model.peft_config["default"])
    settings.inference_mode = True
    settings.save_pretrained(folder)
    save_file(weights or adapter_state(model), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if (source := source_of(model)) is not None:
        fingerprint = model_fingerprint(source.folder)
        record: dict[str, Any] = {"base_model": source.name, "base_fingerprint": fingerprint}
        if any(quantized_layers(model)):
            record["base_weights"] = NF4
        if (scheme := record_of(model)) is not None:
            record["qat"] = scheme
        write_json(folder / BASE_RECORD, record)


def read_weights(model: Any, folder: Path) -> None:
    """Put the weights in `folder` in place of those of `model`, bit for bit. Raises: ModelError if they do not fit."""
    if hasattr(model, "peft_config"):
        read_adapter(model, folder)
        return
    source = ModelSource(name=str(folder), folder=folder, reference=str(folder))
    saved = load_model(source, dtype=model.dtype, device="cpu", attention="sdpa")
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise ModelError(f"does not fit the model: {error}", where=str(folder), fix="name its own model") from error


def merge_adapter(
    adapter: str | Path, output: str | Path, settings: ModelSettings | None = None, *, dtype: str | None = None,
    cache_dir: str | Path | None = None, form: Form = "safetensors",
) -> MergeReport:  # fmt: skip
    """Write the base model with the adapter's update added into `output`, proved equal on fixed probe texts.

    Weights are added in float32 and rounded once to `dtype` (fp32, bf16 or fp16; None: the base's own) or to what
    `form` says. What was trained by `qat` is written with the rounded weights, or as torchao's layers. A whole model is
    taken too where there is something to do: another form, or weights to round. The files are then read back and their
    logits compared with the trained model's; `merge.json` beside them holds the figures, README.md how it was trained.
    Raises: ModelError when they differ by more than rounding explains, with nothing left at `output`; UsageError when
    `output` is not empty; MissingError without torchao.
    """
    import torch

    adapter, output = Path(adapter).expanduser(), Path(output).expanduser()
    if not is_adapter(adapter) and form == "safetensors" and scheme_in(adapter) is None:
        raise ModelError("no adapter_config.json", where=str(adapter.absolute()), fix="name an adapter's folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError("the output is not empty", where=str(output.absolute()), fix="name a new folder")
    load = partial(load_trained, adapter, settings or ModelSettings(), dtype=torch.float32, device="cpu",
                   attention="sdpa", cache_dir=cache_dir)  # fmt: skip
    model, tokenizer = load()
    switch(model, True, activations=form == "torchao")  # only torchao's layers round their inputs
    probes = _probe_ids(tokenizer, model.config.get_text_config().vocab_size)
    wanted, without = _logits(model, probes), None
    if hasattr(model, "peft_config"):
        with model.disable_adapter():
            without = _logits(model, probes)
    base = source_of(model)
    if form == "torchao" and record_of(model) is None:
        raise ModelError("torchao's layers are for what training.method: qat trained", where=str(adapter.absolute()),
                         fix="choose another --format")  # fmt: skip
    target = _stored_dtype(model) if dtype is None else getattr(torch, _DTYPES[dtype])
    if any(quantized_layers(model)):  # PEFT would merge into 4 bits again
        del model
        model, _ = load(unpack=True)
    merged = model.merge_and_unload(safe_merge=True) if hasattr(model, "peft_config") else model
    del model
    with publish_folder(output) as folder:
        kind = _write(merged, tokenizer, folder, form, target)
        del merged
        report = _compare(_reload(folder, probes, form), wanted, without, kind)
        _check_proof(report, adapter)
        write_json(folder / "merge.json", asdict(report))
        card = model_card(output.name, base.name if base else None, adapter, str(report))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def _write(merged: Any, tokenizer: Any, folder: Path, form: Form, target: torch.dtype) -> str:
    """The files of the merged model in float32; returns the number format that they hold."""
    if form == "torchao":
        return write_converted(merged, tokenizer, folder)
    fix_rounding(merged)
    if form == "safetensors":
        merged.to(target)
        merged.config.dtype = target
        write_model(merged, tokenizer, folder)
        return str(target).removeprefix("torch.")
    kind: Kind = "f16" if form == "gguf-f16" else "q8_0"
    write_gguf(merged, tokenizer, folder / f"model-{kind}.gguf", kind)
    return kind


def _stored_dtype(model: Any) -> torch.dtype:
    """The dtype that the base's config.json names; the one in memory says how it was loaded."""
    import torch

    source = source_of(model)
    config = read_json(source.folder / "config.json") if source else {}
    name = config.get("dtype") or config.get("torch_dtype")
    dtype: torch.dtype = getattr(torch, name) if name in TOLERANCES else torch.float32
    return dtype


def _reload(folder: Path, probes: torch.Tensor, form: Form) -> torch.Tensor:
    import torch

    if form == "torchao":
        return _logits(read_converted(folder), probes)
    if form != "safetensors":
        return _logits(read_gguf(next(folder.glob("*.gguf"))), probes)
    source = ModelSource(name=str(folder), folder=folder, reference=str(folder))
    return _logits(load_model(source, dtype=torch.float32, device="cpu", attention="sdpa"), probes)


def _probe_ids(tokenizer: Any, vocab_size: int) -> torch.Tensor:
    """Token ids [5, 64]: the probe texts, filled up with ids from all over the vocabulary, and a row of such ids."""
    import torch

    spread = torch.arange(64 * (len(PROBES) + 1)).mul_(7919).remainder_(vocab_size).view(-1, 64).clone()
    for row, text in zip(spread, PROBES, strict=False):
        ids = tokenizer(text, return_tensors="pt").input_ids[0, :64]
        row[: len(ids)] = ids
    return spread


def _logits(model: Any, probes: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=probes, use_cache=False).logits
    return logits


def _compare(merged: torch.Tensor, wanted: torch.Tensor, without: torch.Tensor | None, dtype: str) -> MergeReport:
    scale = wanted.double().norm()
    return MergeReport(
        dtype=dtype,
        relative_difference=float((merged - wanted).double().norm() / scale),
        max_absolute_difference=float((merged - wanted).abs().max()),
        adapter_effect=None if without is None else float((without - wanted).double().norm() / scale),
        tolerance=TOLERANCES[dtype],
        probe_tokens=wanted.shape[0] * wanted.shape[1],
    )


def _check_proof(report: MergeReport, adapter: Path) -> None:
    error, effect = report.relative_difference, report.adapter_effect
    if not error <= report.tolerance:  # also when it is not a number
        raise ModelError(
            f"the merged model's logits differ by {error:.1e}, more than {report.tolerance:.0e}", where=str(adapter),
            fix="merge in float32, or use the adapter as it is",
        )  # fmt: skip
    if effect is not None and error > max(_LOST * effect, TOLERANCES["float32"]):
        raise ModelError(
            f"rounding to {report.dtype} ({error:.1e}) hides what the adapter does ({effect:.1e})", where=str(adapter),
            fix="merge in float32, or use the adapter as it is",
        )  # fmt: skip
