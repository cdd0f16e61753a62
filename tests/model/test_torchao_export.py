"""What `qat` trained becomes torchao's layers, or plain files of rounded weights, with the logits of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llamahome.config import Config, ModelSettings
from llamahome.errors import ModelError
from llamahome.model.adapters import apply_adapter, trainable_parameters
from llamahome.model.export import merge_adapter, save_model
from llamahome.model.fake_quant import INT4, INT8, PAIRED, switch
from llamahome.model.load import load_model, resolve_model

pytest.importorskip("torchao")
IDS = torch.arange(3, 35)[None]
SCHEMES = (PAIRED, INT4, INT8)


def trained(folder: Path, settings: dict[str, Any]) -> Any:
    source = resolve_model(str(folder), ModelSettings())
    model = load_model(source, dtype=torch.float32, device="cpu", attention="sdpa")
    model = apply_adapter(model, Config.load(None, {"lora.rank": 4, **settings})).eval()
    generator = torch.Generator().manual_seed(7)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_reads_the_converted_model(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path, scheme: str, lora: bool
) -> None:
    from transformers import AutoModelForCausalLM

    model = trained(tiny_model_dir, {"training.method": "qat", "qat.scheme": scheme, "qat.lora": lora})
    save_model(model, tiny_tokenizer, tmp_path / "trained")
    report = merge_adapter(tmp_path / "trained", tmp_path / "converted", form="torchao")
    assert (report.dtype, report.adapter_effect is None) == ("torchao", not lora)
    assert report.relative_difference <= report.tolerance
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert type(plain.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao.")
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_files_hold_the_rounded_weights(
    tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path, scheme: str, lora: bool
) -> None:
    from transformers import AutoModelForCausalLM

    model = trained(tiny_model_dir, {"training.method": "qat", "qat.scheme": scheme, "qat.lora": lora})
    save_model(model, tiny_tokenizer, tmp_path / "trained")
    report = merge_adapter(tmp_path / "trained", tmp_path / "merged", dtype="fp32")
    assert report.relative_difference <= report.tolerance
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    if scheme != INT8:  # whose rows of 64 numbers fit into its 256 levels anyway
        groups = plain.model.layers[1].self_attn.q_proj.weight.detach().view(-1, 32)
        assert max(len(group.unique()) for group in groups) <= 16
    switch(model, True, activations=False)  # whoever loads plain weights does not round what goes in
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_what_was_not_trained_for_it_is_refused(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_model(trained(tiny_model_dir, {}), tiny_tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match="torchao's layers are for what") as caught:
        merge_adapter(tmp_path / "adapter", tmp_path / "out", form="torchao")
    assert (caught.value.exit_code, (tmp_path / "out").exists()) == (4, False)
