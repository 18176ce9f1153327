"""Turns pydantic's errors into lines for users: full path of the field, what is wrong, how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from errors import ConfigError, brief, shown

_MOST = 100  # problems that are explained


class Section(BaseModel):
    """A configuration or a section of one: frozen, without unknown fields or infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Validate plain values, as read from YAML.

        Raises:
            ConfigError: One line for each problem, with the full path of its field.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(error, cls, values) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `from_dict` makes the same configuration."""
        return self.model_dump(mode="json")


def explain(error: ValidationError, schema: type[BaseModel], values: Any) -> ConfigError:
    """A `ConfigError` with one line for each distinct problem, in the order of the fields."""
    lines: dict[str, None] = {}
    for details in error.errors(include_url=False)[:_MOST]:
        if details["type"] == "float_type" and isinstance(details["input"], list):
            continue  # for a schedule given as a list there are errors of the list itself as well
        for line in _lines(details, schema):
            lines[line] = None
    return ConfigError("\n".join(_without_union_echo(list(lines))))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation, also within `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = section_of(inner)
        if found is not None:
            return found
    return None


def _lines(details: ErrorDetails, schema: type[BaseModel]) -> Iterator[str]:
    location, within = _walk(details["loc"], schema)
    path = ".".join(location)
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        yield _unknown(location, within, schema)
    elif kind == "missing":
        yield f"{path}: missing; set it (`raymoe config` prints a complete file)"
    elif kind == "value_error":
        reason = str(details.get("ctx", {}).get("error", details["msg"]))
        for line in reason.splitlines():
            yield _prefixed(path, line, within)
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        yield f"{path or 'the configuration'}: {brief(value)} is not a mapping; write `field: value` lines"
    else:
        message = details["msg"].removeprefix("Input ")
        yield f"{path}: {brief(value)} {message}"


def _walk(loc: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The path of a field as users write it, and the section that contains the field.

    pydantic appends the member of a union that it tried (`float`, `list[…]`), which is left out.
    """
    path: list[str] = []
    within: type[BaseModel] | None = schema
    for i, part in enumerate(loc):
        if isinstance(part, int):
            path[-1:] = [f"{path[-1]}[{part}]"] if path else [f"[{part}]"]
            continue
        last = i == len(loc) - 1
        if within is not None and part in within.model_fields:
            path.append(part)
            inner = section_of(within.model_fields[part].annotation)
            if not last or inner is not None:
                within = inner
        elif last and within is not None and part.isidentifier() and part not in ("float", "int", "list"):
            path.append(part)
    return path, within


def _unknown(location: list[str], within: type[BaseModel] | None, schema: type[BaseModel]) -> str:
    name = location[-1] if location else "?"
    known = list(within.model_fields) if within is not None else []
    parent = ".".join(location[:-1])
    line = f"{shown('.'.join(location))}: unknown field"
    name = shown(name)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"{line}; did you mean {parent + '.' if parent else ''}{close[0]}?"
    paths = list(_paths(schema))
    names = [path.rpartition(".")[2] for path in paths]
    elsewhere = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    if elsewhere:
        found = [path for path, leaf in zip(paths, names, strict=True) if leaf == elsewhere[0]]
        return f"{line}; did you mean {' or '.join(found)}?"
    return f"{line}; {parent or 'the configuration'} has {', '.join(known)}"


def _paths(schema: type[BaseModel], parent: str = "") -> Iterator[str]:
    """The paths of all fields in the sections of a configuration."""
    for name, field in schema.model_fields.items():
        if parent:
            yield f"{parent}{name}"
        inner = section_of(field.annotation)
        direct = inner in (field.annotation, *get_args(field.annotation))  # not in the entries of a list
        if inner is not None and direct:
            yield from _paths(inner, f"{parent}{name}.")


def _prefixed(path: str, line: str, within: type[BaseModel] | None) -> str:
    """Put the section's path before the message of a validator, which starts with the field's name."""
    first = line.replace(":", " ").split(maxsplit=1)[0] if line.strip() else ""
    if path and within is not None and first.split(".")[0] in within.model_fields:
        return f"{path}.{line}"
    return f"{path}: {line}" if path else line


def _without_union_echo(lines: list[str]) -> list[str]:
    """Keep one line of those that a union reports, one per member: the first one with the deepest path."""
    paths = [line.partition(": ")[0] for line in lines]
    kept = []
    for i, path in enumerate(paths):
        deeper = any(other.startswith((f"{path}[", f"{path}.")) for other in paths)
        if not deeper and path not in paths[:i]:
            kept.append(lines[i])
    return kept


__all__ = ["explain", "section_of"]
