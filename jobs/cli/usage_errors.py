"""Usage errors as one line: what is wrong, and which help says more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from jobs.console import INTERRUPTED

# Typer's own class for an unknown option, a missing argument and the like, which it does not export.
_UsageError: Any = typer.BadParameter.__base__

_NUMBERS = {"int": "a whole number", "float": "a number"}


class OneLineErrors(TyperGroup):
    """A group of commands whose usage errors are one line each, in the form of all other errors."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:  # Typer would exit without a word
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except _UsageError as error:
        if type(error).show is not _UsageError.show:  # a command without arguments, which shows its help
            raise
        words = _wrong_value(error) or " ".join(error.format_message().split()).rstrip(".")
        command = "raymoe" if error.ctx is None else error.ctx.command_path
        more = "" if words.endswith("?") else ";"
        print(f"error: {words}{more} `{command} --help` lists what there is", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def _wrong_value(error: Any) -> str:
    """What is wrong with a number or a choice, and what to give; empty for other usage errors.

    Typer tells it in the words of pydantic, whose error is the cause of its own.
    """
    param: Any = getattr(error, "param", None)
    cause: Any = error.__cause__
    if param is None or not hasattr(cause, "errors"):
        return ""
    name = param.get_error_hint().strip("'").split("'")[0]
    value = cause.errors()[0]["input"]
    annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    if kind := _NUMBERS.get(getattr(annotation, "__name__", "")):
        wanted = kind + _range(getattr(param, "min", None), getattr(param, "max", None))
    elif choices := [one for one in getattr(annotation, "__args__", ()) if isinstance(one, str)]:
        wanted = " or ".join(choices)
    else:
        return ""
    return f"{name} is {value!r}; give {wanted}"


def _range(least: float | None, most: float | None) -> str:
    if least is None:
        return "" if most is None else f" up to {most:,.12g}"
    if most is None:
        return f" of at least {least:,.12g}"
    return f" from {least:,.12g} to {most:,.12g}"


__all__ = ["OneLineErrors"]
