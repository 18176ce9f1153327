"""The chart's values: the keys of values.yaml with the comments that describe them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "raymoe"

_KEY = re.compile(r"^( *)([A-Za-z][\w-]*):(?: |$)")
_MARKS = ("# @schema ", "# @entries ", "# @fields ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A key of values.yaml.

    Attributes:
        path: its name with those of the sections around it.
        default: its value there.
        text: what it does; of a section, what it is about, or nothing.
        schema: what its `@schema` comment says.
        entries: section whose fields each entry of this mapping has; empty: it is no such mapping.
        fields: section whose fields this section has beside its own; empty: none.
        children: of a section; a key with a description has none.
    """

    path: tuple[str, ...]
    default: Any
    text: str = ""
    schema: Mapping[str, Any] = field(default_factory=dict)
    entries: str = ""
    fields: str = ""
    children: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        """The path as `--set` takes it."""
        return ".".join(self.path)

    def sections(self) -> Iterator[Value]:
        """This section and all within it, in their order."""
        if self.children:
            yield self
        for child in self.children:
            yield from child.sections()

    def leaves(self) -> Iterator[Value]:
        """All keys with a description, in their order."""
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()


@dataclass(frozen=True, slots=True)
class _Comment:
    """The comment above a key; `described` if it says what the key does."""

    text: str
    described: bool
    schema: Mapping[str, Any]
    entries: str
    fields: str


def read_values(file: Path = CHART / "values.yaml") -> Value:
    """The root of all values.

    Raises:
        ValueError: a key has neither a description nor keys of its own that have.
    """
    source = file.read_text(encoding="utf-8")
    return _value((), yaml.safe_load(source), _comments(source.splitlines()))


def _value(path: tuple[str, ...], default: Any, comments: Mapping[tuple[str, ...], _Comment]) -> Value:
    comment = comments.get(path, _Comment("", False, {}, "", ""))
    if comment.described:
        return Value(
            path=path,
            default=default,
            text=comment.text,
            schema=comment.schema,
            entries=comment.entries,
        )
    if not isinstance(default, dict) or not default:
        raise ValueError(
            f"values.yaml: {'.'.join(path)} has no description; write one that begins with `# --`"
        )
    children = tuple(_value((*path, name), value, comments) for name, value in default.items())
    return Value(path=path, default=default, text=comment.text, fields=comment.fields, children=children)


def _comments(lines: list[str]) -> dict[tuple[str, ...], _Comment]:
    """The comment above each key, by the key's path."""
    found: dict[tuple[str, ...], _Comment] = {}
    around: list[tuple[int, str]] = []  # the keys that a line is within, with their indentation
    above: list[str] = []
    for line in lines:
        if line.lstrip().startswith("#"):
            above.append(line.strip())
            continue
        match = _KEY.match(line)
        if match is not None:
            depth = len(match[1])
            around = [(at, name) for at, name in around if at < depth]
            around.append((depth, match[2]))
            if above:
                found[tuple(name for _, name in around)] = _comment(above)
        above = []
    return found


def _comment(lines: list[str]) -> _Comment:
    marked = {mark: line.removeprefix(mark) for line in lines for mark in _MARKS if line.startswith(mark)}
    text = " ".join(line.removeprefix("#").strip() for line in lines if not line.startswith(_MARKS))
    schema = json.loads(marked.get("# @schema ", "{}"))
    described = text.startswith("-- ")
    return _Comment(
        text.removeprefix("-- "),
        described,
        schema,
        marked.get("# @entries ", ""),
        marked.get("# @fields ", ""),
    )


__all__ = ["CHART", "Value", "read_values"]
