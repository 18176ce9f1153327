"""The commands that operate a running job: `raymoe status | scale | drain | chaos | certs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from errors import ConfigError
from jobs.cli.options import Debug, Json, Result
from jobs.console import finish, say, surfaced

Job = Annotated[
    str | None,
    typer.Option(
        "--coordinator", metavar="HOST:PORT", help="The job's coordinator; by default found through Ray."
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option("--address", help="Address of the job's Ray cluster; by default the one on this machine."),
]
Patience = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for completion; 0 returns immediately.")
]


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    for command in (status, scale, drain, chaos, certs):
        app.command()(surfaced(command))


def status(
    coordinator: Job = None,
    address: Cluster = None,
    watch: Annotated[bool, typer.Option("--watch", help="Update the display until Ctrl-C.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a job's expert hosts, their experts, and the last events."""
    from rich.console import Console

    with _operated(coordinator, address, debug) as job:
        from jobs.tools.running_job import shown
        from jobs.tools.running_job import watch as show_on

        if as_json:
            finish(job.status, as_json=True)
        elif watch:
            show_on(job.status)
        else:
            Console(highlight=False).print(shown(job.status()), soft_wrap=True)


def scale(
    hosts: Annotated[int, typer.Argument(metavar="N", help="Number of expert hosts.")],
    coordinator: Job = None,
    address: Cluster = None,
    timeout: Patience = 300.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Change the number of expert hosts of a training or serving job."""
    with _operated(coordinator, address, debug) as job:
        done = job.scale(hosts, timeout=timeout)
    _tell(done, as_json=as_json)


def drain(
    host: Annotated[
        str | None, typer.Argument(metavar="[HOST]", help="Name of the host, as in `raymoe status`.")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(metavar="ID|here", help="Drain all hosts of this Ray node and replace them elsewhere."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Start another host in its place; else there is one fewer.")
    ] = False,
    coordinator: Job = None,
    address: Cluster = None,
    timeout: Patience = 300.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Move the experts of a host, or of all hosts of a node, to others, and stop it."""
    if (host is None) == (node is None):
        raise ConfigError("drain takes either a HOST or --node; name one of them")
    if node is not None:
        _drain_node(node, address, timeout, as_json=as_json, debug=debug, coordinator=coordinator)
        return
    with _operated(coordinator, address, debug) as job:
        done = job.drain(host, replace=replace, timeout=timeout)
    _tell(done, as_json=as_json)


def chaos(
    seed: Annotated[int, typer.Option(min=0, help="Seed of the schedule of faults.")] = 0,
    duration: Annotated[float, typer.Option(min=0, help="Seconds for which faults happen.")] = 60.0,
    every: Annotated[float, typer.Option(min=0.01, help="Mean time between two faults, in seconds.")] = 10.0,
    kinds: Annotated[
        str, typer.Option(help="Comma-separated: kill, stop, slow, drop (connections).")
    ] = "kill",
    targets: Annotated[
        str, typer.Option(help="Comma-separated: host, coordinator, trunk (serving), worker (training).")
    ] = "host",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the schedule of faults.")] = False,
    coordinator: Job = None,
    address: Cluster = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Inject faults into a running job: kill, stop, slow down or disconnect its processes."""
    from jobs.fleet.ray_token import use_own_token

    use_own_token()
    from jobs.tools.chaos import TARGETS, FaultKind, schedule

    faults = schedule(
        seed,
        duration=duration,
        every=every,
        kinds=[FaultKind(one) for one in _choices(kinds, [str(kind) for kind in FaultKind], "--kinds")],
        targets=_choices(targets, list(TARGETS), "--targets"),
    )

    def compute() -> Result:
        from dataclasses import asdict

        from jobs.tools.running_job import rehearse

        if dry_run:
            done = [asdict(fault) for fault in faults]
        else:
            done = rehearse(faults, coordinator=coordinator, address=address, debug=debug, tell=say)
        return {"seed": seed, "faults": done}

    if dry_run and not as_json:
        for fault in faults:
            print(f"{fault.at:7.2f} s  {fault.kind} {fault.target}")
        return
    if as_json:
        finish(compute, as_json=True)
    else:
        compute()


def certs(
    directory: Annotated[str, typer.Argument(help="Directory to write to; set RAYMOE_TLS_DIR to it.")],
    days: Annotated[
        float, typer.Option(min=0.001, max=36500, help="Days for which the certificate is valid.")
    ] = 90.0,
    ca_days: Annotated[
        float, typer.Option(min=0.001, max=36500, help="Days for which a new authority is valid.")
    ] = 3650.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Create an authority and a certificate for mutual TLS, or renew the certificate of an authority."""
    from jobs.tools.certs import make_certificates

    if not directory.strip():  # an unset shell variable; the files would land in the working directory
        raise ConfigError("DIRECTORY is empty; name the directory to write to, or . for this one")
    made = make_certificates(Path(directory), days=days, ca_days=ca_days)
    if as_json:
        finish(lambda: made, as_json=True)
        return
    what = "authority and certificate" if made["new_authority"] else "certificate"
    print(f"{what} in {directory}, good until {made['certificate_until']}")


def _drain_node(
    node: str, address: str | None, timeout: float, *, as_json: bool, debug: bool, coordinator: str | None
) -> None:
    if coordinator is not None:
        raise ConfigError("--node drains the hosts of all jobs there; leave out --coordinator")
    from jobs.fleet.ray_token import use_own_token

    use_own_token()
    from jobs.tools.node_drain import leave

    done = leave(None if node == "here" else node, address=address, timeout=timeout, debug=debug)
    if as_json:
        finish(lambda: done, as_json=True)
    else:
        hosts = ", ".join(done["drained"]) or "no expert host"
        print(f"{hosts} and {done['replicas']} trunk replicas were moved in {done['seconds']:.1f} s")


def _choices(text: str, known: list[str], option: str) -> list[str]:
    """The names in a comma-separated list.

    Raises:
        ConfigError: A name is unknown, or there is none.
    """
    chosen = [one.strip() for one in text.split(",") if one.strip()]
    unknown = [one for one in chosen if one not in known]
    if unknown or not chosen:
        what = f"{', '.join(unknown)} is unknown" if unknown else "the list is empty"
        raise ConfigError(f"{option}: {what}; there are {', '.join(known)}")
    return chosen


def _operated(coordinator: str | None, address: str | None, debug: bool) -> Any:
    from jobs.fleet.ray_token import use_own_token

    use_own_token()
    from jobs.tools.running_job import operated

    return operated(coordinator=coordinator, address=address, debug=debug)


def _tell(done: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        finish(lambda: done, as_json=True)
        return
    hosts = f"{done['hosts']} expert host{'s' * (done['hosts'] != 1)}"
    if done["done"]:
        print(f"{hosts} after {done['seconds']:.2f} s")
    else:
        print(f"changing to {hosts}; `raymoe status --watch` shows the progress")


__all__ = ["add_to"]
