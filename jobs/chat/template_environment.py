"""Jinja as Hugging Face's chat templates use it, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, best first


def compile_template(source: str) -> Template:
    """A template that can be rendered.

    Raises:
        TemplateError: The source is no valid template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    environment.globals["dict"] = _Dictionaries()
    environment.globals["namespace"] = _TemplateNamespace
    return environment.from_string(source)


def render(
    template: Template,
    messages: Iterable[Mapping[str, Any]],
    special: Mapping[str, str],
    *,
    characters: int,
) -> str:
    """The prompt that the assistant's answer follows, as `apply_chat_template` renders it.

    Args:
        template: From `compile_template`.
        messages: The conversation, in JSON's types.
        special: Texts of special tokens by name.
        characters: Length of the prompt, at most.

    Raises:
        Exception: Of any type, since a template can fail in every way that an expression can.
    """
    parts, size = [], 0
    variables = {
        **special,
        "messages": [_conventional(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    for part in template.generate(**variables):
        size += len(part)
        if size > characters:
            raise TemplateError(f"the prompt would have more than {characters} characters")
        parts.append(part)
    return "".join(parts)


def _conventional(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without fields that are null, and with its reasoning under the names that templates read."""
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


class _GenerationBlock(Extension):
    """`{% generation %}` … `{% endgeneration %}`, which marks the assistant's text in training."""

    tags = {"generation"}  # noqa: RUF012  # the type that Jinja declares

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dictionaries:
    """`dict` of templates: makes dictionaries, and is no class whose attributes lead elsewhere."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace` of templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Namespace has it, so that `self` can be a name
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have {name!r}; leave out the underscore")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


__all__ = ["compile_template", "render"]
