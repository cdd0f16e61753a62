"""Tokens equal the chat template's own, and exactly the assistant's words and end token are trained."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llamahome.config import Config, DataSettings
from llamahome.data import masks
from llamahome.data.rows import Row
from llamahome.data.schemas import Sample, SchemaReader
from llamahome.data.templates import Renderer
from llamahome.errors import ConfigError, ModelError

CHATML = (  # SmolLM2
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN3 = (  # earlier turns lose their reasoning, the last one gets an empty one if it has none
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{%- set content = m.content %}"
    "{%- set think = '' %}{%- if '</think>' in content %}"
    "{%- set think = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\\n<think>\\n' + think.strip('\\n') + '\\n</think>\\n\\n'"
    " + content.lstrip('\\n') }}{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
DEEPSEEK = (  # the generation prompt opens the reasoning, but turns are rendered without any
    "{{bos_token}}{% for m in messages %}{% if m.role == 'user' %}{{'<|User|>' + m.content}}{% else %}"
    "{{'<|Assistant|>' + m.content.split('</think>')[-1] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|Assistant|><think>\n'}}{% endif %}"
)
PHI3 = (  # closes every sample with the end-of-text token
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_PROMPT = (  # an old template that knows no generation prompt
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
GENERATION = (  # marks, in a template whose prefixes differ
    "{{ messages | length }} {% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
ADDED = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]", "<think>", "</think>", "<|User|>", "<|Assistant|>", "<|end|>", "<|user|>",
    "<|assistant|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_tokenizer):
    """The tiny tokenizer with the control tokens of all templates; its eos is </s> as in Mistral."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED, "bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def data_settings(**values) -> DataSettings:
    return Config.load(None, {f"data.{name}": value for name, value in values.items()}).data


def chat(*contents: str, system: str = "") -> Sample:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return Sample("f.jsonl", 7, "messages", messages=messages)


def trained_texts(tokenizer, sample: Sample, **values) -> list[str]:
    """The trained runs of a sample as text, after a check that its tokens are the template's own."""
    [encoded] = Renderer(tokenizer, data_settings(**values)).encode([sample])
    ids = encoded.ids.tolist()
    assert ids == tokenizer.apply_chat_template(sample.messages, tokenize=True)["input_ids"]
    assert encoded.ids.dtype == np.uint32
    assert encoded.trained.dtype == np.bool_
    assert not encoded.trained[0]
    edges = np.flatnonzero(np.diff(encoded.trained)) + 1
    runs = zip(np.split(encoded.ids, edges), np.split(encoded.trained, edges), strict=True)
    return [tokenizer.decode(part.tolist()) for part, trained in runs if trained.any()]


PLAIN_CHAT = chat("What is two plus two?", "Two plus two is four.", "And the sea?", "It is quick.\nAnd brown  ")
CASES = {
    "chatml": (CHATML, ["Two plus two is four.<|im_end|>", "It is quick.\nAnd brown  <|im_end|>"]),
    "llama3": (LLAMA3, ["Two plus two is four.<|eot_id|>", "It is quick.\nAnd brown<|eot_id|>"]),
    "mistral": (MISTRAL, [" Two plus two is four.</s>", " It is quick.\nAnd brown  </s>"]),
    "gemma": (GEMMA, ["Two plus two is four.<end_of_turn>", "It is quick.\nAnd brown<end_of_turn>"]),
    "qwen3": (QWEN3, ["Two plus two is four.<|im_end|>", "<think>\n\n</think>\n\nIt is quick.\nAnd brown  <|im_end|>"]),
    "deepseek": (DEEPSEEK, ["Two plus two is four.<|im_end|>", "It is quick.\nAnd brown  <|im_end|>"]),
    "phi3": (PHI3, ["Two plus two is four.<|end|>", "It is quick.\nAnd brown  <|end|>\n</s>"]),
    "no_prompt": (NO_PROMPT, ["Two plus two is four.<|im_end|>", "It is quick.\nAnd brown  <|im_end|>"]),
    "no_end": (NO_END, [" Two plus two is four.\n", " It is quick.\nAnd brown  \n"]),
    "generation": (GENERATION, ["Two plus two is four.<|im_end|>", "It is quick.\nAnd brown  <|im_end|>"]),
}


@pytest.mark.parametrize("name", CASES)
def test_exactly_the_assistants_turns_are_trained(base, name):
    template, expected = CASES[name]
    assert trained_texts(with_template(base, template), PLAIN_CHAT) == expected


def test_reasoning_is_trained_where_the_template_shows_it(base):
    tokenizer = with_template(base, QWEN3)
    thought = "<think>\nadd them\n</think>\n\n"
    sample = chat("a", f"{thought}four", "b", f"{thought}five")
    assert trained_texts(tokenizer, sample) == ["four<|im_end|>", f"{thought}five<|im_end|>"]


def test_words_that_occur_elsewhere_are_not_mistaken_for_the_answer(base):
    """What a search for the answer's text would get wrong."""
    tokenizer = with_template(base, CHATML)
    sample = chat(
        "assistant\nyes", "yes", "yes", "assistant", "<|im_start|>assistant\nno<|im_end|>\n", "no", system="yes"
    )
    assert trained_texts(tokenizer, sample) == ["yes<|im_end|>", "assistant<|im_end|>", "no<|im_end|>"]


def test_end_tokens_within_an_answer_do_not_end_it(base):
    sample = chat("q", "a<|im_end|>b<|im_end|>")
    for template in (CHATML, DEEPSEEK):
        assert trained_texts(with_template(base, template), sample) == ["a<|im_end|>b<|im_end|><|im_end|>"]


def test_positions_count_the_spaces_that_a_post_processor_leaves_out(base):
    from tokenizers.processors import ByteLevel

    tokenizer = with_template(base, MISTRAL)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert trained_texts(tokenizer, chat("a", "the sea")) == [" the sea</s>"]
    glued = MISTRAL.replace("' [/INST]'", "' [/INST] '").replace("' ' + message", "message")
    assert trained_texts(with_template(tokenizer, glued), chat("a", "the sea")) == [" sea</s>"]


def test_a_token_across_the_beginning_is_not_trained(base):
    """The prompt ends in a space, which is part of the answer's first token."""
    glued = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '.\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = with_template(base, glued)
    tokens = tokenizer.tokenize("user: a.\nassistant: the sea.\n")
    assert "Ġthe" in tokens
    assert trained_texts(tokenizer, chat("a", "the sea")) == [" sea.\n"]


def test_a_token_across_the_end_is_trained(base):
    template = (
        "{{ messages | length }}{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ 'a.\n' }}{% endfor %}"
    )
    assert trained_texts(with_template(base, template), chat("x", " the se")) == [" the sea"]


def test_bytes_of_one_character_are_trained_together(base):
    tokenizer = with_template(base, CHATML)
    assert trained_texts(tokenizer, chat("日本😀", "😀é東\u2028x")) == ["😀é東\u2028x<|im_end|>"]


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    template=st.sampled_from([CHATML, GEMMA, QWEN3, DEEPSEEK, PHI3, GENERATION, NO_PROMPT]),
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"]), min_size=1, max_size=12), min_size=2, max_size=6
    ),
)
def test_any_chat_trains_each_answer_and_nothing_else(base, template, contents):
    contents = [f"x{text}x" for text in contents[: len(contents) // 2 * 2]]
    found = trained_texts(with_template(base, template), chat(*contents))
    answers = contents[1::2]
    assert len(found) == len(answers)
    for text, answer in zip(found, answers, strict=True):
        assert text.rpartition("</think>\n\n")[2].replace("\n</s>", "").rpartition("<")[0] == answer


def test_batches_equal_single_samples(base):
    renderer = Renderer(with_template(base, CHATML), data_settings())
    samples = [chat("a" * i, "b" * (i + 1)) for i in range(1, 20)]
    for one, many in zip(samples, renderer.encode(samples), strict=True):
        [alone] = renderer.encode([one])
        assert np.array_equal(alone.ids, many.ids)
        assert np.array_equal(alone.trained, many.trained)


def test_all_tokens_but_the_first_can_be_trained(base):
    [encoded] = Renderer(with_template(base, CHATML), data_settings(train_on="all")).encode([PLAIN_CHAT])
    assert encoded.trained.tolist() == [False] + [True] * (len(encoded.ids) - 1)


def test_the_tokenizers_truncation_and_padding_neither_matter_nor_change(base):
    tokenizer = with_template(base, CHATML)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    before = tokenizer.backend_tokenizer.to_str()
    [encoded] = Renderer(tokenizer, data_settings()).encode([PLAIN_CHAT])
    assert tokenizer.backend_tokenizer.to_str() == before
    [expected] = Renderer(with_template(base, CHATML), data_settings()).encode([PLAIN_CHAT])
    assert np.array_equal(encoded.ids, expected.ids)


def test_tools_reach_the_template(base):
    template = "{% if tools %}{{ tools[0]['function']['name'] + '\n' }}{% endif %}" + CHATML
    sample = chat("q", "a")
    sample.tools = [{"type": "function", "function": {"name": "the sea", "parameters": {}}}]
    tokenizer = with_template(base, template)
    [encoded] = Renderer(tokenizer, data_settings()).encode([sample])
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(sample.messages, tools=sample.tools)["input_ids"]
    assert tokenizer.decode(encoded.ids.tolist()).startswith("the sea\n")
    assert tokenizer.decode(encoded.ids[encoded.trained].tolist()) == "a<|im_end|>"


@pytest.mark.parametrize("marks", ["{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"])
def test_tokens_do_not_depend_on_the_day(base, marks, monkeypatch):
    """They are kept for other days, and a preparation may be stopped at midnight."""
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    source = "{{ messages | length }}{{ strftime_now('%d %b %Y') }} {% for m in messages %}" + marks + "{% endfor %}"
    tokenizer = with_template(base, source)
    named = chat("q", "a")
    named.messages[0]["name"] = "Ann"  # another way through transformers
    for sample in (chat("q", "a"), named):
        [item] = Renderer(tokenizer, data_settings(train_on="all")).render([sample])
        assert item.text == "226 Jul 2024 qa"
    assert Renderer(tokenizer, data_settings()).template.identity != source


# Text, and tokenizers without a template


def text_sample(text: str) -> Sample:
    return Sample("f.txt", 1, "text", text=text)


def adds_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def test_a_text_is_trained_whole_and_ends_with_eos(base):
    [encoded] = Renderer(base, data_settings()).encode([text_sample("the sea")])
    ids = base("the sea", add_special_tokens=False)["input_ids"]
    assert encoded.ids.tolist() == [*ids, base.eos_token_id]
    assert encoded.trained.tolist() == [False] + [True] * len(ids)


def test_bos_is_there_once(base):
    tokenizer = adds_bos(base)
    [encoded] = Renderer(tokenizer, data_settings()).encode([text_sample("the sea")])
    assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert encoded.trained.tolist() == [False] + [True] * (len(encoded.ids) - 1)
    [encoded] = Renderer(with_template(tokenizer, LLAMA3), data_settings()).encode([PLAIN_CHAT])
    assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_eos_is_there_once(base):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(base)
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
    [encoded] = Renderer(tokenizer, data_settings()).encode([text_sample("the sea")])
    assert encoded.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_pairs_need_no_template(base, caplog):
    tokenizer = with_template(adds_bos(base), None)
    sample = SchemaReader(data_settings()).read(Row({"prompt": "two plus", "completion": "four"}, "f", 1))
    with caplog.at_level("INFO"):
        renderer = Renderer(tokenizer, data_settings())
        [encoded] = renderer.encode([sample])
        renderer.encode([sample])
    assert tokenizer.decode(encoded.ids.tolist()) == "<s>two plus\nfour</s>"
    assert tokenizer.decode(encoded.ids[encoded.trained].tolist()) == "four</s>"
    assert caplog.text.count("no chat template; samples are prompt, line break, answer and end token") == 1


def test_chats_need_a_template(base):
    tokenizer = with_template(base, None)
    with pytest.raises(ModelError, match="the tokenizer has no chat template") as caught:
        Renderer(tokenizer, data_settings()).encode([PLAIN_CHAT])
    assert "f.jsonl:7" in caught.value.where
    assert "chatml" in caught.value.fix
    assert caught.value.exit_code == 4


def test_templates_can_be_named_and_read_from_files(base, tmp_path):
    tokenizer = with_template(base, None)
    path = tmp_path / "my template.jinja"
    path.write_text(CHATML)
    from_file = Renderer(tokenizer, data_settings(template=str(path)))
    assert "".join(item.text for item in from_file.render([PLAIN_CHAT])).startswith("<|im_start|>system\nYou are")
    named = Renderer(tokenizer, data_settings(template="chatml"))
    [encoded] = named.encode([PLAIN_CHAT])
    assert tokenizer.decode(encoded.ids[encoded.trained].tolist()) == (
        "Two plus two is four.<|im_end|>It is quick.\nAnd brown  <|im_end|>"
    )
    assert named.fingerprint != from_file.fingerprint
    with pytest.raises(ConfigError, match="cannot read the template"):
        Renderer(tokenizer, data_settings(template=str(tmp_path / "gone.jinja")))


def test_the_fingerprint_follows_the_tokenizer(base):
    prints = {
        Renderer(tokenizer, data_settings()).fingerprint
        for tokenizer in (base, with_template(base, CHATML), with_template(base, LLAMA3), adds_bos(base))
    }
    assert len(prints) == 4
    assert Renderer(copy.deepcopy(base), data_settings()).fingerprint in prints


def test_slow_tokenizers_are_refused(base):
    class Slow:
        is_fast, name_or_path = False, "slow-model"

    with pytest.raises(ModelError, match="no fast form"):
        Renderer(Slow(), data_settings())


# Templates that fail

FAILING = {
    "syntax": ("{% for m in messages %}", "fails: TemplateSyntaxError"),
    "raises": (MISTRAL, "fails: TemplateError: Conversation roles must alternate"),
    "undefined": ("{{ messages[0].nothing.at_all }}", "fails: UndefinedError"),
    "escape": ("{{ messages.__class__.__mro__ }}", "fails: SecurityError"),
    "endless": (
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "runs for more than",
    ),
    "huge": ("{{ 'x' * 30000000 }}", "makes 30,000,000 characters"),
    "hides": (
        "{{ messages[-1].content | length }}: {% for m in messages %}{{ m.content }}{% endfor %}",
        "cannot be told from its own",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_templates_that_fail_name_the_row(base, monkeypatch, name):
    if name == "endless":
        monkeypatch.setattr(masks, "RENDER_SECONDS", 0.3)
    template, what = FAILING[name]
    with pytest.raises(ModelError) as caught:
        Renderer(with_template(base, template), data_settings()).encode([chat("a question", "an answer", system="s")])
    assert what in caught.value.what
    assert caught.value.where.endswith("f.jsonl:7")
    assert caught.value.exit_code == 4
