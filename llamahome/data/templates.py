"""Samples to tokens: the chat template is rendered, tokenised once, and the tokens to train on are marked exactly.

The spans of the text that are trained come from `data.masks`, the tokens in them from `data.encoding`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llamahome.data.encoding import Encoded, Encoder, Rendered
from llamahome.data.masks import TODAY, Template
from llamahome.data.schemas import PAIRS, Sample
from llamahome.errors import ConfigError, ModelError
from llamahome.plugins import installed, is_import_path, load_object

if TYPE_CHECKING:
    from llamahome.config.schema import DataSettings

logger = logging.getLogger(__name__)

MAX_TEMPLATE_BYTES = 1 << 20
NAMED = MappingProxyType(
    {
        "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    }
)


class Renderer:
    """Renders and tokenises samples; holds a private copy of the tokenizer without truncation and padding."""

    def __init__(self, tokenizer: Any, settings: DataSettings) -> None:
        """`tokenizer` is a fast one of transformers. Raises: ModelError, ConfigError (`data.template`)."""
        self._train_all = settings.train_on == "all"
        self.name = str(tokenizer.name_or_path or type(tokenizer).__name__)
        backend = _copy_backend(tokenizer, self.name)
        bos, eos = _ends(backend, tokenizer.eos_token_id)
        self.vocab_size = max(len(tokenizer), *(number + 1 for number in tokenizer.added_tokens_decoder), 1)
        source = _template_source(tokenizer, settings.template, self.name)
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        special = dict(tokenizer.special_tokens_map)
        self.template = Template(source, special, added, self.name) if source else None
        spec = backend.to_str()
        identity = (spec, str(source), str(sorted(special.items())), f"{bos} {eos}")
        backend.post_processor = None  # ByteLevel's would leave spaces out of the tokens' positions
        self._encoder = Encoder(backend, json.loads(spec), bos, eos, train_all=self._train_all)
        self.fingerprint = hashlib.sha256("\0".join(identity).encode()).hexdigest()
        self._said_plain = False
        if self.template and self.template.is_dated:
            logger.info("%s: the chat template writes the date; training sees %s", self.name, TODAY)

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Tokens and trained marks of samples, in their order. Raises: ModelError that names the row."""
        return self.tokenize(self.render(samples))

    def render(self, samples: Sequence[Sample]) -> list[Rendered]:
        """Samples as text. Raises: ModelError for a template that is missing, fails, or never ends."""
        if self.template is None:
            return [self._render_plain(sample) for sample in samples]
        with self.template as template:
            return [self._render_chat(sample, template) for sample in samples]

    def _render_chat(self, sample: Sample, template: Template) -> Rendered:
        if not sample.messages:
            return _whole_text(sample)
        text, spans = template.render(sample, find_spans=not self._train_all)
        return Rendered(text, spans)

    def _render_plain(self, sample: Sample) -> Rendered:
        """Without a chat template: the text, or the prompt, a line break and the answer."""
        if not sample.messages:
            return _whole_text(sample)
        if sample.schema not in PAIRS:
            raise ModelError(
                "the tokenizer has no chat template",
                where=f"{self.name}, {sample.file}:{sample.line}",
                fix=f"set data.template to {', '.join(NAMED)} or a Jinja file",
            )
        if not self._said_plain:
            self._said_plain = True
            logger.info("%s: no chat template; samples are prompt, line break, answer and end token", self.name)
        *asked, answer = [str(message["content"]) for message in sample.messages]
        prompt = "\n".join(asked) + "\n"
        return Rendered(prompt + answer, [(len(prompt), len(prompt) + len(answer))], closed=True)

    def tokenize(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokens of rendered samples. Runs without Python's lock for the most part; threads may do it at once."""
        return self._encoder.encode(rendered)


def _whole_text(sample: Sample) -> Rendered:
    return Rendered(sample.text, [(0, len(sample.text))], closed=True)


def _copy_backend(tokenizer: Any, name: str) -> Any:
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        fix = "use a model folder with a tokenizer.json"
        raise ModelError("the tokenizer has no fast form, so positions in the text are unknown", where=name, fix=fix)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
    return backend


def _ends(backend: Any, eos: int | None) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before a text, and those that end it (with eos, once)."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    before, after = full[:at], full[at + len(bare) :]
    if eos is not None and eos not in after:
        after = [*after, eos]
    return before, after


def _template_source(tokenizer: Any, name: str, tokenizer_name: str) -> str | None:
    if name in NAMED:
        return NAMED[name]
    if name != "auto" and (is_import_path(name) or name in installed("data.template")):
        return str(load_object(name, key="data.template"))
    if name != "auto":
        return _read_template(Path(name).expanduser())
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates, none of them the default
        raise ModelError(str(error), where=tokenizer_name, fix="set data.template to a Jinja file") from None


def _read_template(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ConfigError(f"larger than {MAX_TEMPLATE_BYTES:,} bytes", where=f"data.template: {path}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = f"name a Jinja file, or one of auto, {', '.join(NAMED)}"
        raise ConfigError(f"cannot read the template {path}: {reason}", where="data.template", fix=fix) from None
