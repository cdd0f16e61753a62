"""Templates that are rendered without Jinja: only those whose words cannot matter, and then to the same text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamahome.data.layout import lays_contents_out
from llamahome.data.masks import Template
from llamahome.data.schemas import Sample

HEAD = "{% for m in messages %}"
TURN = HEAD + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN = (  # Qwen 2.5's shape
    "{%- if tools %}{{- tools | length }}{%- else %}{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}{%- endif %}"
    "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' and not loop.first)"
    " or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role }}{%- if message.content %}"
    "{{- '\\n' + message.content }}{%- endif %}{%- for tool_call in message.tool_calls %}"
    "{{- '\\n<tool_call>\\n' ~ tool_call.name }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}{%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != 'tool') %}"
    "{{- '<|im_start|>user' }}{%- endif %}{{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}"
    "{%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}" + PROMPT
)
LLAMA = (  # Llama 3.1's shape
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start|>system<|end|>\\n\\n' }}{{- system_message }}{{- '<|eot|>' }}{%- for message in messages %}"
    "{{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<t>' + role + '\n' + message['content'] | trim"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<t>model\n' }}{% endif %}"
)
NO_END = (
    HEAD + "{{ m.role + ': ' + m.content.strip() + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ONE_SPACE = HEAD + "{{ ' ' + m.content|trim + ' ' }}{% endfor %}"
PLAIN = {
    "chatml": TURN + PROMPT, "qwen": QWEN, "llama": LLAMA, "gemma": GEMMA, "no end": NO_END, "spaces": ONE_SPACE,
    "joined": HEAD + "{% set text = m.role ~ '|' ~ m.content %}{% if loop.first %}{% set text = bos_token + text %}"
    "{% endif %}{{ text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ 'assistant|' }}{% endif %}",
    "typed": HEAD + "{% if m.content is string and m.content is not none %}{{ m.content or 'none' }}{% endif %}"
    "<|im_end|>{% endfor %}",
    "twice": HEAD + "{{ m['content'] }}{{ m.get('content', '') if m.role == 'user' else '' }}<|im_end|>{% endfor %}",
}  # fmt: skip
# Each looks into a content, or may, in another way.
LOOKS = {
    "test": "{% if 'x' in m.content %}x{% endif %}",
    "equal": "{% if m.content == 'x' %}x{% endif %}",
    "length": "{{ m.content | length }}",
    "method": "{{ m.content.split('x')[0] }}",
    "one side": "{{ m.content.lstrip() }}",
    "characters": "{{ m.content.strip('x') }}",
    "filter": "{{ m.content | upper }}",
    "item": "{{ m.content[0] }}",
    "loop": "{% for c in m.content %}{{ c }}-{% endfor %}",
    "trimmed join": "{{ (m.content + ' ') | trim }}",
    "set": "{% set text = m.content %}{% if text == 'x' %}x{% endif %}",
    "set later": "{% if text == 'x' %}x{% endif %}{% set text = m.content %}",
    "namespace": "{% set ns.text = m.content %}",
    "keyword": "{{ dict(a=m.content) }}",
    "whole": "{{ m }}",
    "json": "{{ m | tojson }}",
    "items": "{% for k, v in m.items() %}{{ v | length }}{% endfor %}",
    "computed key": "{{ m['con' + 'tent'] | length }}",
    "neighbour": "{{ loop.previtem.content | length if loop.previtem else '' }}",
    "neighbour item": "{{ loop['previtem'] }}",
    "attr": "{{ loop | attr('nextitem') }}",
    "renamed loop": "{% set l = loop %}{{ l.nextitem }}",
    "changed": "{% if loop.changed(m.content) %}x{% endif %}",
    "all": "{{ messages | map(attribute='content') | join }}",
    "list": "{% set l = [m] %}{{ l[0].content | length }}",
    "tuple": "{% set a, b = m, 1 %}{{ a }}",
    "macro": "{% macro f(x) %}{{ x | length }}{% endmacro %}{{ f(m.content) }}",
    "block": "{% set x %}{{ m.content }}{% endset %}{{ x | length }}",
    "filter block": "{% filter upper %}{{ m.content }}{% endfilter %}",
    "random": "{{ [1, 2] | random }}",
    "lipsum": "{{ lipsum() }}",
}


def proves(source: str) -> bool:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    return lays_contents_out(environment, source)


def template(source: str) -> Template:
    return Template(source, {"bos_token": "<s>", "eos_token": "</s>"}, ["<|im_end|>", "<|eot|>"], "name")


def chat(contents: list[str], *, system: bool) -> Sample:
    roles = ("system", *("user", "assistant") * len(contents)) if system else ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return Sample("f", 1, "messages", messages=messages)


WORDS = st.text(st.sampled_from(" \n\txé:|<>") | st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
CONTENT = st.one_of(WORDS, st.sampled_from(["<|im_end|>", " <|im_", "end|>", "assistant\n", "<|eot|>  ", "x  "]))


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=25, deadline=None)
@given(chats=st.lists(st.lists(CONTENT, min_size=3, max_size=7), min_size=2, max_size=5), system=st.booleans())
def test_frames_write_what_jinja_writes(name: str, chats: list[list[str]], system: bool) -> None:
    quick, plain = template(PLAIN[name]), template(PLAIN[name])
    assert proves(PLAIN[name])
    with quick, plain:
        for contents in chats:
            sample = chat(contents[: (len(contents) - system) // 2 * 2 + system], system=system)
            for _ in range(2):  # the first makes the frame
                assert quick.render(sample) == plain._render(sample, find_spans=True)
            if all(text.strip() for text in contents) and name != "spaces":
                assert quick._frames[tuple(message["role"] for message in sample.messages)] is not None


@pytest.mark.parametrize("name", LOOKS)
def test_what_may_look_into_a_content_is_refused(name: str) -> None:
    assert proves(HEAD + "{{ m.content }}{% endfor %}")
    assert not proves("{% set ns = namespace(text='') %}" + HEAD + LOOKS[name] + "{% endfor %}")


def test_jinja_is_left_out(monkeypatch) -> None:
    one = template(TURN + PROMPT)
    with one:
        one.render(chat(["a", "b"], system=False))
        monkeypatch.setattr(Template, "_text", None)
        text, [(begin, end)] = one.render(chat(["what", "this"], system=False))
        with pytest.raises(TypeError):
            one.render(chat(["what", "this"], system=True))
    assert text == "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\nthis<|im_end|>\n"
    assert text[begin:end] == "this<|im_end|>"


@pytest.mark.parametrize("change", [{"name": "Ann"}, {"content": " \n"}, {"content": ""}])
def test_other_messages_are_rendered_one_by_one(change: dict) -> None:
    source = HEAD + "{{ m.name }}{{ m.content or 'nothing' }}<|im_end|>{% endfor %}"
    quick, plain = template(source), template(source)
    with quick, plain:
        quick.render(chat(["a", "b"], system=False))
        sample = chat(["a", "b"], system=False)
        sample.messages[0] |= change
        assert quick.render(sample) == plain._render(sample, find_spans=True)
