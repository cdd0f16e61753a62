"""Chat templates: the rendered text and the spans of it that the assistant wrote, found by rendering.

A trained span begins where the prompt of the turn ends (the template rendered up to the turn with its generation
prompt) and reaches to the end of the turn's end token. White space that the template adds after that token is left
out; if the template has no end token, the span is the whole turn. What a template appends to close a sample (Phi-3's
`<|endoftext|>`) counts as the last turn's end.

Templates that render a turn in another way once more turns follow (Qwen3 removes earlier reasoning) are no prefix of
themselves. There `{% generation %}` marks decide if the template has them; else the turn is rendered twice with other
contents, and what the two have in common around the difference is the template's.

Most templates need not be run for every sample: `data.frames`. Templates that write today's date get a fixed one, for
tokens are kept, gone on with on another day, and compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Self, TypeVar

from llamahome.data.encoding import Span
from llamahome.data.frames import Frame, find_frame
from llamahome.data.layout import lays_contents_out
from llamahome.data.schemas import Message, Sample
from llamahome.data.watchdog import TimeLimit, Watchdog
from llamahome.errors import ModelError
from llamahome.memory.oom import is_oom

Roles = tuple[str, ...]
T = TypeVar("T")

RENDER_SECONDS = 10.0
# A rendered sample may be this much longer than its messages.
GROWTH_FACTOR, GROWTH_CHARS = 100, 1 << 20
TODAY = date(2024, 7, 26)  # for templates that ask; Llama 3's write this one where no date is to be had
MAX_FRAMES = 1000  # each for chats of other roles
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Template:
    """A chat template with its tokenizer's special tokens. Render inside `with template:`, which limits the time."""

    def __init__(self, source: str, special_tokens: dict[str, object], added_tokens: Sequence[str], name: str) -> None:
        """`name` is the tokenizer's, for messages."""
        self.source, self.special_tokens, self.name = source, special_tokens, name
        self._added = tuple(added_tokens)
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._closing = re.compile(rf"\s*(?:{'|'.join(longest_first)})") if self._added else None
        self._marked = bool(_GENERATION.search(source))
        self.is_dated = "strftime_now" in source
        self._bare_prompt: bool | None = None  # the generation prompt lacks the turn's header
        self._frames: dict[Roles, Frame | None] = {}

    @property
    def identity(self) -> str:
        """What decides about the texts, apart from the special tokens."""
        return f"{self.source}\0{TODAY}" if self.is_dated else self.source

    def __enter__(self) -> Self:
        self._watchdog = Watchdog(RENDER_SECONDS).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.__exit__(kind, error, trace)

    def render(self, sample: Sample, *, find_spans: bool = True) -> tuple[str, list[Span]]:
        """The text of a chat and its trained spans, in characters. Raises: ModelError that names the row."""
        roles = _plain_roles(sample)
        frame = self._frames.get(roles)
        if frame is not None:
            text, turns = frame.lay(sample.messages)
            return text, [(start, self._end(text, start, end)) for start, end in turns] if find_spans else []
        rendered = self._render(sample, find_spans=find_spans)
        if roles and roles not in self._frames and len(self._frames) < MAX_FRAMES and self._lays_out:
            self._frames[roles] = self._find_frame(sample, roles)
        return rendered

    def _find_frame(self, sample: Sample, roles: Roles) -> Frame | None:
        """The frame of a sample's roles, if there is one."""
        if self._bare_prompt:
            return None
        with suppress(ModelError):  # of fewer messages than the sample has
            return find_frame(lambda messages, prompt: self._text(sample, messages, prompt=prompt), roles)
        return None

    def _render(self, sample: Sample, *, find_spans: bool) -> tuple[str, list[Span]]:
        text = self._text(sample, sample.messages)
        if not find_spans:
            return text, []
        turns = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
        if self._bare_prompt is None:
            self._bare_prompt = self._lacks_header(sample, turns[0])
        spans = [self._prefix_span(sample, turn, text) for turn in turns]
        if None in spans and self._marked:
            return text, self._marked_spans(sample, text)
        return text, [span or self._varied_span(sample, turn, text) for turn, span in zip(turns, spans, strict=True)]

    def _prefix_span(self, sample: Sample, turn: int, text: str) -> Span | None:
        """The span of a turn, or None where rendering fewer messages does not give a prefix of `text`."""
        prompt = self._text(sample, sample.messages[:turn], prompt=True)
        last = turn + 1 == len(sample.messages)
        until = text if last else self._text(sample, sample.messages[: turn + 1])
        if self._bare_prompt or not text.startswith(prompt) or not text.startswith(until):
            return None
        return len(prompt), self._end(text, len(prompt), len(until))

    def _end(self, text: str, start: int, end: int) -> int:
        """Leave out white space after the end token."""
        turn = text[start:end].rstrip()
        return start + len(turn) if turn.endswith(self._added) else end

    def _marked_spans(self, sample: Sample, text: str) -> list[Span]:
        work = partial(self._transformers, sample, sample.messages, return_assistant_tokens_mask=True)
        _, [marks] = self._guarded(work, sample)
        ends = [self._end(text, start, end) for start, end in marks]
        closed = [end if text[:end].endswith(self._added) else self._close(text, end) for end in ends]
        return [(start, end) for (start, _), end in zip(marks, closed, strict=True)]

    def _close(self, text: str, end: int) -> int:
        """Take in an end token that follows directly, or after white space."""
        found = self._closing.match(text, end) if self._closing else None
        return found.end() if found else end

    def _varied_span(self, sample: Sample, turn: int, text: str) -> Span:
        head, tail = self._frame(sample, turn)
        if len(head) + len(tail) > len(text) or not text.startswith(head) or not text.endswith(tail):
            raise ModelError(
                "the chat template renders this sample so that the assistant's words cannot be told from its own",
                where=f"{self.name}, {sample.file}:{sample.line}",
                fix="add {% generation %} marks to the template and name it in data.template, or train_on: all",
            )
        # A space before the first word is part of that word's token.
        start = len(head.rstrip(" "))
        return start, self._close(text, len(text) - len(tail))

    def _frame(self, sample: Sample, turn: int) -> tuple[str, str]:
        """What surrounds the content of a turn: the common ends of two renderings with other contents."""
        one, two = (self._text(sample, _replaced(sample.messages, turn, content)) for content in ("0", "1"))
        head = _shared(one, two)
        tail = min(_shared(one[::-1], two[::-1]), len(one) - head, len(two) - head)
        return one[:head], one[len(one) - tail :]

    def _lacks_header(self, sample: Sample, turn: int) -> bool:
        prompt = self._text(sample, sample.messages[:turn], prompt=True)
        head, _ = self._frame(sample, turn)
        return (
            head.startswith(prompt)
            and bool(head[len(prompt) :].strip())
            and prompt == self._text(sample, sample.messages[:turn])
        )

    def _text(self, sample: Sample, messages: Sequence[Message], *, prompt: bool = False) -> str:
        # Names, tool calls and reasoning go through all that transformers does to them.
        plain = not sample.tools and all(len(message) == 2 for message in messages)
        work = partial(self._quick, messages, prompt) if plain else partial(self._full, sample, messages, prompt)
        text = self._guarded(work, sample)
        size = sum(len(message["content"]) for message in messages)
        if len(text) > GROWTH_FACTOR * size + GROWTH_CHARS:
            raise self._error(f"makes {len(text):,} characters of {size:,}", sample)
        return text

    def _quick(self, messages: Sequence[Message], prompt: bool) -> str:
        """`render_jinja_template` for plain messages, in a third of its time."""
        compiled, names = self._compiled
        context = compiled.new_context(names | {"messages": messages, "add_generation_prompt": prompt}, shared=True)
        return "".join(compiled.root_render_func(context))

    @cached_property
    def _lays_out(self) -> bool:
        return lays_contents_out(self._compiled[0].environment, self.source)

    @cached_property
    def _compiled(self) -> tuple[Any, dict[str, object]]:
        from jinja2.runtime import LoopContext
        from transformers.utils.chat_template_utils import _compile_jinja_template

        environment = _compile_jinja_template(self.source).environment.overlay()
        environment.getattr = partial(_attribute, environment.getattr, LoopContext)
        compiled = environment.from_string(self.source)
        return compiled, {
            **compiled.globals,
            "strftime_now": TODAY.strftime,
            "tools": None,
            "documents": None,
            **self.special_tokens,
        }

    def _full(self, sample: Sample, messages: Sequence[Message], prompt: bool) -> str:
        [text], _ = self._transformers(sample, messages, add_generation_prompt=prompt)
        return text

    def _transformers(
        self, sample: Sample, messages: Sequence[Message], **options: bool
    ) -> tuple[list[str], list[list[Span]]]:
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        template = {"chat_template": self.source, "tools": sample.tools, **options, **self.special_tokens}
        # It takes no functions, and keeps what it compiled for others.
        names = _compile_jinja_template(self.source).environment.globals
        today, names["strftime_now"] = names["strftime_now"], TODAY.strftime
        try:
            rendered: tuple[list[str], list[list[Span]]] = render_jinja_template([messages], **template)
        finally:
            names["strftime_now"] = today
        return rendered

    def _guarded(self, work: Callable[[], T], sample: Sample) -> T:
        try:
            return self._watchdog.run(work)
        except TimeLimit:
            raise self._error(f"runs for more than {RENDER_SECONDS:.0f} s", sample) from None
        except Exception as error:  # a template may fail in any way
            if is_oom(error):
                raise
            raise self._error(f"fails: {type(error).__name__}: {error}", sample) from error

    def _error(self, what: str, sample: Sample) -> ModelError:
        return ModelError(
            f"the chat template {what}",
            where=f"{self.name}, {sample.file}:{sample.line}",
            fix="mend the sample, or set data.template to another template",
        )


def _attribute(sandboxed: Callable[[object, str], object], loop: type, owner: object, name: str) -> object:
    """The sandbox's attribute, without its long look at what a loop counts, which is a quarter of the time."""
    if type(owner) is loop and name in ("first", "last", "index", "index0"):
        return getattr(owner, name)
    return sandboxed(owner, name)


def _plain_roles(sample: Sample) -> Roles:
    """The roles of a chat that has nothing but contents, none of them blank; else none."""
    if sample.tools:
        return ()
    for message in sample.messages:
        if len(message) != 2 or not message["content"] or message["content"].isspace():
            return ()
    return tuple([message["role"] for message in sample.messages])


def _replaced(messages: Sequence[Message], turn: int, content: str) -> list[Message]:
    return [*messages[:turn], {**messages[turn], "content": content}, *messages[turn + 1 :]]


def _shared(one: str, two: str) -> int:
    """The length of the common beginning."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(two[:middle]) else (low, middle - 1)
    return low
