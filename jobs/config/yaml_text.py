"""Reads YAML by the rules of YAML 1.2, and writes configurations with their descriptions as comments."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from errors import ConfigError

_WIDTH = 100
_YAML_NAMES = {"None": "null", "True": "true", "False": "false"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, `on` and `no` as strings, and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                continue
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes strings which `_Loader` would read as another type."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Rules for the types of plain scalars in YAML 1.2's core schema, by the scalar's first character."""
    rules: list[tuple[str, str, str]] = [
        ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
        ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
        ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
        (
            "float",
            r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$",
            "-+.0123456789",
        ),
        ("merge", r"^<<$", "<"),
    ]
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {"": [("tag:yaml.org,2002:null", re.compile("^$"))]}
    for tag, pattern, firsts in rules:
        for first in firsts:
            table.setdefault(first, []).append((f"tag:yaml.org,2002:{tag}", re.compile(pattern)))
    return table


_Loader.yaml_implicit_resolvers = _resolvers()
_Dumper.yaml_implicit_resolvers = _resolvers()


def parse_yaml(text: str, where: str) -> Any:
    """The values of a YAML text.

    Args:
        text: The text.
        where: Origin of the text, for the error.

    Raises:
        ConfigError: It is not YAML; the message has `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{where}{at}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        ConfigError: It cannot be read or parsed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; give a YAML file (`raymoe config` prints one)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    return parse_yaml(text, str(path))


def commented_yaml(config: BaseModel) -> str:
    """A configuration as YAML, each field below its description; `read_yaml` returns the same values."""
    return "\n".join(_section(config, config.model_dump(mode="json"), 0)) + "\n"


def _section(config: BaseModel, values: dict[str, Any], depth: int) -> Iterator[str]:
    indent = "  " * depth
    documented = _documented_attributes(type(config))
    for name in type(config).model_fields:
        value, inner = values[name], getattr(config, name)
        if depth == 0 and name != next(iter(values)):
            yield ""
        if name in documented:
            yield from textwrap.wrap(
                documented[name],
                _WIDTH,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}# ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        if isinstance(inner, BaseModel):
            yield f"{indent}{name}:"
            yield from _section(inner, value, depth + 1)
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _documented_attributes(schema: type[BaseModel]) -> dict[str, str]:
    """The description of each field in the `Attributes:` section of a class's docstring."""
    found: dict[str, str] = {}
    _, _, attributes = inspect.cleandoc(schema.__doc__ or "").partition("\nAttributes:\n")
    for entry in re.split(r"\n(?=    \w)", "\n" + attributes):
        names, separator, words = entry.strip().partition(":")
        if separator:
            # Docstrings name Python's values, the file has YAML's.
            written = re.sub(r"\b(None|True|False)\b", lambda m: _YAML_NAMES[m[0]], " ".join(words.split()))
            for name in names.split(","):
                found[name.strip()] = written
    return found


def _scalar(value: Any) -> str:
    """A value as one line of YAML, in flow style."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


__all__ = ["commented_yaml", "parse_yaml", "read_yaml"]
