"""Usage errors as one line: what is wrong, and which help says more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

# Typer's own class for an unknown option, a missing argument and the like, which it does not export.
_UsageError: Any = typer.BadParameter.__base__


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
    except _UsageError as error:
        if type(error).show is not _UsageError.show:  # a command without arguments, which shows its help
            raise
        words = " ".join(error.format_message().split()).rstrip(".")
        command = "raymoe" if error.ctx is None else error.ctx.command_path
        print(f"error: {words}; `{command} --help` lists what there is", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


__all__ = ["OneLineErrors"]
