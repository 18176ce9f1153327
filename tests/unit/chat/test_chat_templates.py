# ruff: noqa: E501  (templates)
"""Chat templates against transformers, with the constructs of published templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from errors import DataError
from jobs.chat.chat_template import PLAIN, ChatTemplate
from jobs.chat.rendering_process import check_template
from jobs.chat.template_environment import compile_template, render

USER = {"role": "user", "content": " What is <b>2 + 2</b> & é? "}
CALLS = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": "ä"}}}]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.\n"},
    USER,
    {"role": "assistant", "content": None, "tool_calls": CALLS, "name": None},
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\nIt is 4.", "reasoning": "by heart"},
    {"role": "user", "content": "Sure?"},
]

CONSTRUCTS = {
    "namespace, system messages collected, content that is missing (DeepSeek-V3)": """
        {%- set ns = namespace(system='', first=true) %}
        {%- for m in messages %}{% if m['role'] == 'system' %}
            {%- set ns.system = ns.system + ('' if ns.first else '\n\n') + m['content'] %}{% set ns.first = false %}
        {%- endif %}{% endfor %}{{ bos_token }}{{ ns.system }}
        {%- for m in messages %}
            {%- if m['role'] == 'assistant' and m['content'] is none %}<none>
            {%- elif m['role'] == 'assistant' and m['tool_calls'] is defined and m['tool_calls'] is not none %}
                {%- for t in m['tool_calls'] %}<call>{{ t['function']['name'] }}{% if not loop.last %},{% endif %}
                {%- endfor %}
            {%- elif m['role'] == 'assistant' %}
                {%- set content = m['content'] %}
                {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
                {{- '<A>' + content + eos_token }}
            {%- elif m['role'] != 'system' %}{{ '<' + m.role + '>' + m['content'] }}{% endif %}
        {%- endfor %}{% if add_generation_prompt and not ns.is_tool %}{{ '<A>' }}{% endif %}""",
    "defaults of names that are not given, dates, headers (Llama-3)": """
        {{- bos_token }}
        {%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
        {%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
        {%- if not tools is defined %}{% set tools = none %}{% endif %}
        {%- if messages[0]['role'] == 'system' %}
            {%- set system_message = messages[0]['content']|trim %}{% set messages = messages[1:] %}
        {%- else %}{% set system_message = "" %}{% endif %}
        {{- "<h>system</h>\n" + date_string + "\n" + system_message + eos_token }}
        {%- for message in messages %}
            {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
                {{- '<h>' + message['role'] + '</h>\n\n' + message['content'] | trim + eos_token }}
            {%- elif 'tool_calls' in message %}
                {%- if not message.tool_calls|length == 1 %}{{ raise_exception("one call") }}{% endif %}
                {{- message.tool_calls[0].function.arguments | tojson }}
            {%- elif message.content is mapping or message.content is iterable %}
                {{- message.content | tojson }}
            {%- endif %}
        {%- endfor %}{{ "<none>" if documents is none }}{{ "<none>" if tools is none }}""",
    "reversed messages, reasoning, macros (Qwen3)": """
        {%- macro told(text, times=1) -%}{{ text * times }}|{{ caller is defined }}{%- endmacro %}
        {%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
        {%- for message in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}
            {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not (
                message.content.startswith('<r>') and message.content.endswith('</r>')) %}
                {%- set ns.multi_step_tool = false %}{% set ns.last = index %}
            {%- endif %}
        {%- endfor %}
        {%- for message in messages %}
            {%- if message.role == "assistant" %}
                {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
                {{- '<s>' ~ message.thinking ~ '|' ~ reasoning.strip('\n') ~ '|' ~ (message.content or '').lstrip() }}
                {%- for call in message.tool_calls or [] %}{{ '\n{"name": "' ~ call.function.name ~ '", ' }}
                    {{- call.function.arguments if call.function.arguments is string
                        else call.function.arguments | tojson }}{% endfor %}
            {%- else %}{{ told(message.content, times=2) }}{{ loop.previtem.role if loop.previtem is defined }}
            {%- endif %}
        {%- endfor %}{{ ns.last }}{% if enable_thinking is defined and enable_thinking is false %}<off>{% endif %}""",
    "alternating roles, filters (Mistral)": """
        {%- set loop_messages = messages | rejectattr("role", "equalto", "system") | list %}
        {%- for m in loop_messages | selectattr("role", "in", ["user"]) %}[INST]{{ m["content"] }}[/INST]{% endfor %}
        {%- if (loop_messages | length) % 2 == 1 %}{{ raise_exception('odd') }}{% endif %}
        {{- messages | map(attribute='role') | unique | join(',') }}{{ unknown_name }}{{ eos_token | upper }}""",
    "break and continue": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{{ loop.index }}{% if m.role == 'tool' %}{% break %}{% endif %}{% endfor %}""",
    "generation": """{% set x = 1 %}{% for m in messages %}{% if m.role == 'assistant' %}
        {% generation %}{% set x = 2 %}{{ m.content }}{{ loop.index }}{% endgeneration %}
    {% else %}{{ m.role }}{{ x }}{% endif %}{% endfor %}""",
    "tojson and its arguments": """{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}
{{ messages[2] | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}{{ 'é<' | tojson(True) }}""",
    "dict": "{% set d = dict(a=1, **{'b': [2]}) %}{{ d.items() | list }}{{ dict.fromkeys('ab', 0) }}{{ d | tojson }}",
    "blocks on lines of their own": "a\n  {% if true %}\nb\n  {% endif %}\n  {# c #}\nd\n",
    "the plain template": PLAIN,
}


def tokenizer_files(directory: Path, **described: Any) -> None:
    Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<x>": 2}, "<x>")).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **described,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def ours(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    return render(compile_template(template.source), messages, template.special, characters=100_000)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer_files(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("source", CONSTRUCTS.values(), ids=CONSTRUCTS)
@pytest.mark.parametrize("messages", [TALK, TALK[:2], [USER]], ids=["talk", "two", "one"])
def test_a_template_renders_as_in_transformers(
    reference: PreTrainedTokenizerFast, source: str, messages: list[dict[str, Any]]
) -> None:
    def attempt(call: Any) -> str:
        try:
            return str(call())
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    expected = attempt(
        lambda: reference.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=True
        )
    )
    template = ChatTemplate(source=source, special={"bos_token": "<s>", "eos_token": "</s>"})
    assert attempt(lambda: ours(template, messages)) == expected


SHOWN = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ messages[0].role }}"


@pytest.mark.parametrize(
    ("described", "files"),
    [
        ({"chat_template": SHOWN}, {}),
        ({"chat_template": "other"}, {"chat_template.jinja": SHOWN}),
        ({"chat_template": [{"name": "default", "template": SHOWN}, {"name": "rag", "template": "r"}]}, {}),
        (
            {"chat_template": "other"},
            {"additional_chat_templates/default.jinja": SHOWN, "additional_chat_templates/rag.jinja": "r"},
        ),
        ({}, {"chat_template.jinja": SHOWN, "additional_chat_templates/tool_use.jinja": "t"}),
        (
            {
                "chat_template": SHOWN,
                "bos_token": None,
                "pad_token": {"__type": "AddedToken", "content": "<x>"},
            },
            {"special_tokens_map.json": json.dumps({"unk_token": {"content": "<x>"}, "eos_token": "<x>"})},
        ),
    ],
    ids=range(6),
)
def test_template_and_special_tokens_are_read_as_by_transformers(
    tmp_path: Path, described: Mapping[str, Any], files: Mapping[str, str]
) -> None:
    tokenizer_files(tmp_path, **described)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(
        [USER], tokenize=False, add_generation_prompt=True
    )
    assert ours(ChatTemplate.from_directory(tmp_path), [USER]) == expected


def test_a_model_without_a_template_gets_the_plain_one(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path).source == PLAIN
    tokenizer_files(tmp_path)
    assert ChatTemplate.from_directory(tmp_path).source == PLAIN


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": {"default": "a"}}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": "r"}]}'),
        ("special_tokens_map.json", b"nul"),
        ("chat_template.jinja", b"{{ '\xe9' }}"),
        ("chat_template.jinja", None),
    ],
    ids=range(11),
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    file = tmp_path / name
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(DataError, match=name) as caught:
        ChatTemplate.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "additional_chat_templates/default.jinja", "tokenizer_config.json"]
)
def test_a_template_that_cannot_be_read_names_its_file(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    broken = "{% for"
    path.write_text(json.dumps({"chat_template": broken}) if file.endswith("json") else broken)
    with pytest.raises(
        DataError, match=rf"the chat template of {re.escape(str(path))} cannot be read: line 1"
    ):
        check_template(ChatTemplate.from_directory(tmp_path))
