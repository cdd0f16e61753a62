"""Models in torchao's quantized layers, in the layout that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamahome.model.fake_quant import convert
from llamahome.model.quiet import quiet_transformers


def write_converted(model: Any, tokenizer: Any, folder: Path) -> str:
    """Convert a model that was trained by `qat`, in place, and write it. Raises: MissingError, ModelError."""
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    settings = TorchAoConfig(convert(model), modules_to_not_convert=head)
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings)  # which takes torchao's tensors apart for the file
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return "torchao"


def read_converted(folder: Path) -> Any:
    """The model as plain transformers loads it, what is not quantized in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
