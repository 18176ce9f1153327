"""The chat template of a model: its own, or a plain default."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import DataError, shown
from jobs.data.carried_files import TEMPLATE_GUARD, files_like, read_object
from jobs.data.special_tokens import special_tokens

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""The template of models that have none."""

_DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A template and the special tokens that it can name.

    Attributes:
        source: Source of the template, in Jinja.
        special: Texts of special tokens by name (`bos_token`, …).
        place: File that it comes from, for errors; empty for the plain template.
    """

    source: str = PLAIN
    special: Mapping[str, str] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @property
    def plain(self) -> bool:
        """Whether it is the template of models that have none, which writes no special tokens."""
        return self.source == PLAIN

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate:
        """The template of a model, from the files that transformers reads, in its order of precedence.

        These are chat_template.jinja and additional_chat_templates/*.jinja, then tokenizer_config.json. A
        model without any gets the plain template.

        Raises:
            DataError: A file cannot be read, or there are several templates and none is called `default`.
        """
        described = directory / "tokenizer_config.json"
        settings = read_object(described)
        named = _apart(directory)
        where = directory / "additional_chat_templates"
        if not named:
            named, where = _configured(settings, described), described
        if named and _DEFAULT not in named:
            names = shown(", ".join(map(repr, sorted(named))))
            raise DataError(
                f"{where} has chat templates called {names}, and none called {_DEFAULT!r}; give one this name"
            )
        source, place = named.get(_DEFAULT, (PLAIN, ""))
        return cls(source=source, special=special_tokens(directory), place=str(place))


def _apart(directory: Path) -> dict[str, tuple[str, Path]]:
    """Templates in files of their own, by name, each with its file."""
    named = {}
    own = directory / "chat_template.jinja"
    with suppress(FileNotFoundError):
        named[_DEFAULT] = TEMPLATE_GUARD.text(own), own
    for file in files_like(directory, "additional_chat_templates/*.jinja"):
        with suppress(FileNotFoundError):  # a link to nothing
            named[file.stem] = TEMPLATE_GUARD.text(file), file
    return named


def _configured(settings: Mapping[str, Any], file: Path) -> dict[str, tuple[str, Path]]:
    """Templates in tokenizer_config.json, by name, each with the file."""
    given = settings.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {_DEFAULT: (given, file)}
    entries = given if isinstance(given, list) else [None]
    named = {}
    for entry in entries:
        name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            raise DataError(
                f"{file}: chat_template must be a text, or a list of objects with the texts name and "
                "template; correct or remove it"
            )
        named[name] = source, file
    return named


__all__ = ["PLAIN", "ChatTemplate"]
