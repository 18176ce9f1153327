"""The commands that operate a running job: `raymoe status | scale | drain`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs.cli_options import Debug, Json
from jobs.console import finish, surfaced

Job = Annotated[
    str | None,
    typer.Option("--coordinator", metavar="HOST:PORT", help="Of the job; by default looked for with Ray."),
]
Cluster = Annotated[
    str | None,
    typer.Option("--address", help="The job's Ray cluster; by default the one that runs on this machine."),
]
Patience = Annotated[float, typer.Option(min=0, help="Seconds to wait until it is done; 0 returns at once.")]


def add_to(app: typer.Typer) -> None:
    """Make these commands of the command line."""
    for command in (status, scale, drain):
        app.command()(surfaced(command))


def status(
    coordinator: Job = None,
    address: Cluster = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, until Ctrl-C.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a job's expert hosts, what they hold, and what happened last."""
    from rich.console import Console

    with _operated(coordinator, address, debug) as job:
        from jobs.operate import shown
        from jobs.operate import watch as show_on

        if as_json:
            finish(job.status, as_json=True)
        elif watch:
            show_on(job.status)
        else:
            Console(highlight=False).print(shown(job.status()), soft_wrap=True)


def scale(
    hosts: Annotated[int, typer.Argument(metavar="N", help="Expert hosts that there should be.")],
    coordinator: Job = None,
    address: Cluster = None,
    timeout: Patience = 300.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Change the number of expert hosts of a job that serves or trains."""
    with _operated(coordinator, address, debug) as job:
        done = job.scale(hosts, timeout=timeout)
    _tell(done, as_json=as_json)


def drain(
    host: Annotated[str, typer.Argument(metavar="HOST", help="As `raymoe status` names it.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Start another one in its place; else one less is wanted.")
    ] = False,
    coordinator: Job = None,
    address: Cluster = None,
    timeout: Patience = 300.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let an expert host give its experts away and go."""
    with _operated(coordinator, address, debug) as job:
        done = job.drain(host, replace=replace, timeout=timeout)
    _tell(done, as_json=as_json)


def _operated(coordinator: str | None, address: str | None, debug: bool) -> Any:
    from jobs.ray_token import use_own_token

    use_own_token()
    from jobs.operate import operated

    return operated(coordinator=coordinator, address=address, debug=debug)


def _tell(done: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        finish(lambda: done, as_json=True)
        return
    hosts = f"{done['hosts']} expert host{'s' * (done['hosts'] != 1)}"
    if done["done"]:
        print(f"{hosts} after {done['seconds']:.2f} s")
    else:
        print(f"on the way to {hosts}; `raymoe status --watch` shows how it goes")


__all__ = ["add_to"]
