"""The command line: `raymoe train | serve | status | scale | generate | eval | export | …`.

A command imports what it needs when it runs, so that `raymoe --help` is fast. Its parameters are its options,
one each, as Typer wants them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jobs.cli import job_commands, model_commands, serve_commands, train_command
from jobs.cli.usage_errors import OneLineErrors


class _BenchmarkGroup(TyperGroup):
    """The commands of `raymoe bench`, imported when one of them is asked for.

    They are defined in `benchmarks.cli`, a layer above this one.
    """

    @property
    def commands(self) -> Any:
        """The commands by name."""
        group: Any = typer.main.get_command(import_module("benchmarks.cli").bench)
        return group.commands

    @commands.setter
    def commands(self, value: Any) -> None:
        """Ignore the commands of the constructor, which has none."""


app = typer.Typer(
    name="raymoe",
    cls=OneLineErrors,
    help="Train and serve DeepSeek-V3-style mixture-of-experts models on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # usage errors as plain lines, not in a box
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (train_command, serve_commands, model_commands, job_commands):
    commands.add_to(app)
app.add_typer(
    typer.Typer(
        name="bench",
        help="Measure this machine.",
        cls=_BenchmarkGroup,
        no_args_is_help=True,
        rich_markup_mode=None,
    )
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"raymoe {version('raymoe')}")
    except PackageNotFoundError:  # run from a checkout, as `ray job submit --working-dir .` does
        print("raymoe (from source)")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


__all__ = ["app"]
