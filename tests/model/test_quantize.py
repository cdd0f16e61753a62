"""4-bit bases: bitsandbytes' own bits, the rest of the model as it was, and the same model once it is unpacked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llamahome.model.quantize as quantize
from llamahome.config import Config, ModelSettings
from llamahome.errors import MissingError
from llamahome.model.adapters import apply_adapter, trainable_parameters
from llamahome.model.fuse import fuse
from llamahome.model.load import load_model, resolve_model
from llamahome.model.quantize import dequantize_model, dequantized, quantize_model, quantized_layers

pytest.importorskip("bitsandbytes")
IDS = torch.arange(3, 35)[None]


def load(folder: Path, dtype: torch.dtype = torch.float32, nf4: bool = True) -> Any:
    source = resolve_model(str(folder), ModelSettings())
    return load_model(source, dtype=dtype, device="cpu", attention="sdpa", nf4=nf4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64), (70, 320), (256, 192)])
def test_the_bits_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.nn import Params4bit

    monkeypatch.setattr(quantize, "_PART", 1 << 12)  # so that the larger ones come in parts
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    own = quantize._params4bit(weight, torch.float32)
    theirs = Params4bit(weight.clone(), quant_type="nf4", compress_statistics=True, requires_grad=False).to("cpu")
    assert torch.equal(own.data, theirs.data)
    scales = [
        dequantize_blockwise(p.quant_state.absmax, p.quant_state.state2) + p.quant_state.offset for p in (own, theirs)
    ]
    torch.testing.assert_close(scales[0], scales[1], rtol=1e-6, atol=1e-6)


def test_a_weight_is_the_nearest_of_sixteen_levels_times_its_scale() -> None:
    layer = nn.Linear(128, 16, bias=False)
    weight = layer.weight.detach().clone()
    model = _around(layer)
    quantize_model(model, dtype=torch.float32, device="cpu")
    blocks = weight.view(-1, 64)
    levels = quantize.from_bitsandbytes(model.inner.weight).code
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = levels[(blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale
    # Scales in 8 bits are off by half a step of 1/128 of their range at most.
    torch.testing.assert_close(dequantized(model.inner).view_as(nearest), nearest, rtol=0, atol=float(scale.max()) / 64)


def _around(layer: nn.Module) -> Any:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer
            self.head = nn.Linear(16, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    return Model()


def test_embedding_head_and_norms_stay_and_stay_tied(tiny_model_dir: Path) -> None:
    plain, model = load(tiny_model_dir, nf4=False), load(tiny_model_dir, torch.bfloat16)
    names = {name for name, _ in quantized_layers(model)}
    assert len(names) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight.bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}
    assert not any(p.requires_grad for _, layer in quantized_layers(model) for p in layer.parameters())


def test_loading_twice_gives_the_same_bits(tiny_model_dir: Path) -> None:
    for (name, a), (_, b) in zip(
        load(tiny_model_dir).named_parameters(), load(tiny_model_dir).named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_unpacked_model_has_the_same_logits(tiny_model_dir: Path, family: str) -> None:
    """GPT-2's layers have biases and hold their weights the other way round."""
    model = load(tiny_model_dir) if family == "llama" else _gpt2()
    before = model(IDS).logits
    dequantize_model(model, torch.float32)
    assert not list(quantized_layers(model))
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-5)


def test_the_logits_are_near_those_before(tiny_model_dir: Path) -> None:
    exact, found = load(tiny_model_dir, nf4=False)(IDS).logits, load(tiny_model_dir)(IDS).logits
    assert 0.001 < float(((exact - found).norm() / exact.norm()).detach()) < 0.2


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=1, n_head=4)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    exact = model(IDS).logits.detach()
    quantize_model(model, dtype=torch.float32, device="cpu")
    assert len(list(quantized_layers(model))) == 4
    assert float((model(IDS).logits.detach() - exact).norm() / exact.norm()) < 0.2  # not of another shape's weights
    return model


def test_rows_that_end_within_a_block_stay_as_they_are() -> None:
    model = _around(nn.Linear(96, 16))
    before = model.inner.weight.detach().clone()
    quantize_model(model, dtype=torch.bfloat16, device="cpu")
    assert not list(quantized_layers(model))
    assert torch.equal(model.inner.weight, before.bfloat16())


def _adapted(folder: Path) -> Any:
    model = apply_adapter(load(folder), Config.load(None, {"lora.rank": 4, "training.method": "qlora"}))
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def test_fused_layers_have_the_same_loss_and_gradients(tiny_model_dir: Path) -> None:
    plain, fused = _adapted(tiny_model_dir), _adapted(tiny_model_dir)
    assert fuse(fused).summary() == "2 layers fused"
    for model in (plain, fused):
        model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    for (name, a), (_, b) in zip(trainable_parameters(plain), trainable_parameters(fused), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_machine_without_the_package_is_told_before_loading(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("llamahome.model.load._from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(MissingError, match=r"llamahome\[qlora\]") as caught:
        load(tiny_model_dir)
    assert caught.value.exit_code == 9


PEAK = """
import sys, torch
from pathlib import Path
from llamahome.config import ModelSettings
from llamahome.model.load import load_model, resolve_model
import bitsandbytes, peft

def held(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024

source = resolve_model(sys.argv[1], ModelSettings())
load_model(resolve_model(sys.argv[2], ModelSettings()), dtype=torch.bfloat16, device="cpu", attention="sdpa", nf4=True)
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
model = load_model(source, dtype=torch.bfloat16, device="cpu", attention="sdpa", nf4=True)
print(held("VmHWM") - before, held("VmRSS") - before)
"""


@pytest.mark.slow
def test_the_peak_of_loading_is_near_the_result(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=3072, num_hidden_layers=3, num_attention_heads=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    del model
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "model"), str(tiny_model_dir)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    peak, result = map(int, done.stdout.split()[-2:])
    print(f"weights {size}, in 4 bits {result}, peak {peak}")
    assert result < 0.45 * size
    assert peak < 0.6 * size
