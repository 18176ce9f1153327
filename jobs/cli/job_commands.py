"""The commands that operate a running job: `raymoe status | scale | drain | chaos | certs`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from errors import ConfigError, ResourceError
from jobs.cli.options import Cluster, Debug, Job, Json, Result
from jobs.console import finish, say, surfaced

At = Annotated[
    str | None,
    typer.Option(
        "--coordinator", metavar="HOST:PORT", help="The job's coordinator; by default the job is looked for."
    ),
]
Patience = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for completion; 0 returns immediately.")
]


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    for command in (status, drain, chaos, certs):
        app.command()(surfaced(command))
    # Parse `-1` as N, not as an option, so that the range check below reports it.
    app.command(context_settings={"ignore_unknown_options": True})(surfaced(scale))


def status(
    coordinator: At = None,
    address: Cluster = None,
    job: Job = None,
    watch: Annotated[bool, typer.Option("--watch", help="Update the display until Ctrl-C.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a job does, its expert hosts, their experts, and the last events."""
    with _operated(coordinator, address, job, changes=False, debug=debug) as (_, client):
        if as_json:
            finish(client.status, as_json=True)
            return
        from rich.console import Console

        from jobs.tools.status_view import shown
        from jobs.tools.status_view import watch as show_on

        if watch:
            show_on(client.status)
        else:
            Console(highlight=False).print(shown(client.status()), soft_wrap=True)


def scale(
    hosts: Annotated[int, typer.Argument(metavar="N", help="Number of expert hosts.")],
    coordinator: At = None,
    address: Cluster = None,
    job: Job = None,
    timeout: Patience = 300.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Change the number of expert hosts of a training or serving job, in place of a change under way."""
    if hosts < 1:
        raise ConfigError(f"N is {hosts}: a job has at least 1 expert host")
    with _operated(coordinator, address, job, debug=debug) as (found, client), _told(found, timeout):
        done = client.scale(hosts, timeout=timeout)
    _tell(found, done, timeout, as_json=as_json)


def drain(
    host: Annotated[
        str | None, typer.Argument(metavar="HOST", help="Name of the host, as in `raymoe status`.")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(metavar="ID|here", help="Drain all hosts of this Ray node and replace them elsewhere."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Start another host in its place; else there is one fewer.")
    ] = False,
    coordinator: At = None,
    address: Cluster = None,
    job: Job = None,
    timeout: Patience = 300.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Move the experts of a host, or of all hosts of a node, to others, and stop it."""
    if (host is None) == (node is None):
        raise ConfigError("drain takes either a HOST or --node; name one of them")
    if node is not None:
        if coordinator is not None or job is not None:
            given = "--job" if coordinator is None else "--coordinator"
            raise ConfigError(f"--node drains the hosts of all jobs there; leave out {given}")
        _drain_node(node, address, timeout, as_json=as_json, debug=debug)
        return
    assert host is not None
    with _operated(coordinator, address, job, debug=debug) as (found, client), _told(found, timeout):
        done = client.drain(host, replace=replace, timeout=timeout)
    _tell(found, done, timeout, as_json=as_json)


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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the schedule of faults, and the job.")
    ] = False,
    coordinator: At = None,
    address: Cluster = None,
    job: Job = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Inject faults into a running job: kill, stop, slow down or disconnect its processes."""
    from dataclasses import asdict

    from jobs.tools.chaos import TARGETS, FaultKind, schedule
    from jobs.tools.cluster_jobs import rehearse
    from jobs.tools.running_job import find_jobs, operated

    faults = schedule(
        seed,
        duration=duration,
        every=every,
        kinds=[FaultKind(one) for one in _choices(kinds, [str(kind) for kind in FaultKind], "--kinds")],
        targets=_choices(targets, list(TARGETS), "--targets"),
    )

    def compute() -> Result:
        jobs = find_jobs(coordinator=coordinator, address=address, changes=True, debug=debug)
        if dry_run and not jobs.jobs and job is None:
            say(f"no job runs {jobs.where}; this is the schedule alone")
            _tell_unknown(jobs)
            return {"seed": seed, "job": None, "faults": [asdict(fault) for fault in faults]}
        found = _chosen(jobs, job)
        say(f"{'would hit' if dry_run else 'hits'} {found.label}")
        if dry_run:
            done = [asdict(fault) for fault in faults]
        else:
            with operated(found) as client:
                done = rehearse(faults, found, client, debug=debug, tell=say)
        return {"seed": seed, "job": found.to_dict(), "faults": done}

    if as_json:
        finish(compute, as_json=True)
        return
    compute()
    if dry_run:
        for fault in faults:
            print(f"{fault.at:7.2f} s  {fault.kind} {fault.target}")


def certs(
    directory: Annotated[
        str, typer.Argument(metavar="DIRECTORY", help="Directory to write to; set RAYMOE_TLS_DIR to it.")
    ],
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


def _drain_node(node: str, address: str | None, timeout: float, *, as_json: bool, debug: bool) -> None:
    from jobs.tools.node_drain import leave

    done = leave(None if node == "here" else node, address=address, timeout=timeout, debug=debug)
    if as_json:
        finish(lambda: done, as_json=True)
        return
    hosts = "; ".join(f"{one['name']} ({one['id']}): {', '.join(one['drained'])}" for one in done["jobs"])
    ended = f"; {_trunks(done['replicas_ended'])} ended without another in its place"
    print(
        f"{hosts or 'no expert host'} and {_trunks(done['replicas'])} were moved in {done['seconds']:.1f} s"
        f"{ended if done['replicas_ended'] else ''}"
    )


def _trunks(number: int) -> str:
    return f"{number} trunk replica{'s' * (number != 1)}"


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


def _chosen(jobs: Any, job: str | None) -> Any:
    """One of the `JobsFound`, with a note on stderr if there may be others."""
    found = jobs.chosen(job)
    _tell_unknown(jobs)
    return found


def _tell_unknown(jobs: Any) -> None:
    """Tell on stderr of coordinators that do not answer."""
    if jobs.note:
        say(jobs.note)


@contextmanager
def _operated(
    coordinator: str | None, address: str | None, job: str | None, *, changes: bool = True, debug: bool
) -> Iterator[tuple[Any, Any]]:
    """The job that a command operates on (`RunningJob`), and a client of it (`AdminClient`)."""
    from jobs.tools.running_job import find_jobs, operated

    jobs = find_jobs(coordinator=coordinator, address=address, changes=changes, debug=debug)
    found = _chosen(jobs, job)
    with operated(found) as client:
        yield found, client


@contextmanager
def _told(job: Any, timeout: float) -> Iterator[None]:
    """Tell on stderr what a change waits for, as long as this context lasts."""
    if not timeout:
        yield
        return
    from jobs.fleet.event_lines import follow_events

    stop = threading.Event()
    thread = threading.Thread(
        target=follow_events,
        args=(stop, job.coordinator, say),
        kwargs={"kinds": ("waiting", "died"), "skip": True},
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _tell(job: Any, done: dict[str, Any], timeout: float, *, as_json: bool) -> None:
    """Print the outcome of a change.

    Raises:
        ResourceError: It was waited for, and is not done.
    """
    hosts = f"{done['hosts']} expert host{'s' * (done['hosts'] != 1)}"
    if as_json:
        finish(lambda: {**done, "job": job.to_dict()}, as_json=True)
    elif done["done"]:
        print(f"{job.label}: {hosts} after {done['seconds']:.2f} s")
    elif not timeout:
        print(f"{job.label}: changing to {hosts}; `raymoe status --watch` shows the progress")
    if timeout and not done["done"]:
        lacking = f" ({done['lacking']})" if done["lacking"] else ""
        raise ResourceError(
            f"{job.label}: the change to {hosts} is not done after {timeout:g} s{lacking}; it goes on, and "
            "another `raymoe scale` takes its place"
        )


__all__ = ["add_to"]
