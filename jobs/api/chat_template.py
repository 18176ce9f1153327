"""Chat templates: the tokenizer's own, or a plain default."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from errors import DataError

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""The template of models that have none."""


class ChatTemplate:
    """Turns messages into a prompt.

    Args:
        source: Source of the template, in Jinja.
        special: Texts of special tokens by name (`bos_token`, …).

    Attributes:
        plain: Whether it is the template of models that have none, which writes no special tokens.

    Raises:
        DataError: The template cannot be parsed.
    """

    def __init__(self, source: str = PLAIN, special: Mapping[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"the chat template cannot be read: {error}") from error
        self._special = dict(special or {})
        self.plain = source == PLAIN

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate:
        """The template of a model: from chat_template.jinja or tokenizer_config.json, else the plain one."""
        settings: dict[str, Any] = {}
        file = directory / "tokenizer_config.json"
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        apart = directory / "chat_template.jinja"
        if apart.is_file():
            return cls(apart.read_text(encoding="utf-8"), special)
        source = settings.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((one["template"] for one in source if one.get("name") == "default"), None)
        return cls(source or PLAIN, special)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that the assistant's answer follows.

        Raises:
            DataError: The template rejects these messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except TemplateError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


__all__ = ["PLAIN", "ChatTemplate"]
