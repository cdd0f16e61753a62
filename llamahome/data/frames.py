"""Chats of equal roles share a frame: the fixed texts around their contents, so that Jinja runs once for all of them.

`data.layout` proves that a template allows it; the frame itself is read off renderings with marked contents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llamahome.data.encoding import Span
from llamahome.data.schemas import Message

# Characters no chat has; contents between white space, to see whether the template trims them.
_MARKS = (("\u2003", "\ue000", "\ue001"), ("\u2002", "\uf8fe", "\uf8ff"))
_REPEATS = 10  # a template that writes contents more often is left to the checks of every sample

Write = Callable[[Sequence[Message], bool], str]  # messages, and whether the generation prompt follows them
Slot = tuple[int, bool]  # number of the message whose content is there, and whether it is trimmed


@dataclass(frozen=True)
class Layout:
    """fixed[0], the content of slots[0], fixed[1], ..., fixed[-1]."""

    fixed: tuple[str, ...]
    slots: tuple[Slot, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Fixed characters and slots."""
        return sum(map(len, self.fixed)), len(self.slots)

    def begins(self, other: Layout) -> bool:
        """Whether it is a prefix of `other` for contents of any words."""
        own = len(self.slots)
        return (
            self.slots == other.slots[:own]
            and self.fixed[:-1] == other.fixed[:own]
            and other.fixed[own].startswith(self.fixed[-1])
        )


@dataclass(frozen=True)
class Frame:
    """How chats of some roles are written. `turns` are the begins and ends of the trained turns, each as the fixed
    characters and the number of slots before it."""

    whole: Layout
    turns: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    def lay(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of a chat and its trained turns, white space after their end tokens included."""
        parts, sizes = [self.whole.fixed[0]], [0]
        for (number, trimmed), fixed in zip(self.whole.slots, self.whole.fixed[1:], strict=True):
            content: str = messages[number]["content"]
            content = content.strip() if trimmed else content
            parts += (content, fixed)
            sizes.append(sizes[-1] + len(content))
        spans = [(begin + sizes[first], end + sizes[last]) for (begin, first), (end, last) in self.turns]
        return "".join(parts), spans


def find_frame(write: Write, roles: Sequence[str]) -> Frame | None:
    """The frame of chats with these roles; None where a turn is no continuation of what was written before it."""
    whole = _layout(write, roles, prompt=False)
    if whole is None or len(whole.slots) > _REPEATS * len(roles):
        return None
    turns = []
    for turn in (i for i, role in enumerate(roles) if role == "assistant"):
        begin = _layout(write, roles[:turn], prompt=True)
        end = whole if turn + 1 == len(roles) else _layout(write, roles[: turn + 1], prompt=False)
        if begin is None or end is None or not begin.begins(whole) or not end.begins(whole):
            return None
        turns.append((begin.size, end.size))
    return Frame(whole, tuple(turns))


def _layout(write: Write, roles: Sequence[str], *, prompt: bool) -> Layout | None:
    """Read a layout off two renderings with different marks; None if the marks are not all that differs."""
    one, two = (_read(write(_marked(roles, marks), prompt), marks) for marks in _MARKS)
    return one if one == two else None


def _marked(roles: Sequence[str], marks: tuple[str, str, str]) -> list[Message]:
    space, begin, end = marks
    return [{"role": role, "content": f"{space}{begin}{i}{end}{space}"} for i, role in enumerate(roles)]


def _read(text: str, marks: tuple[str, str, str]) -> Layout:
    space, begin, end = marks
    # Trimmed on both sides or on none.
    found = list(re.finditer(f"({space})?{begin}(\\d+){end}(?(1){space})", text))
    edges = [0, *(place for match in found for place in match.span()), len(text)]
    fixed = tuple(text[first:last] for first, last in list(pairwise(edges))[::2])
    return Layout(fixed, tuple((int(match[2]), not match[1]) for match in found))
