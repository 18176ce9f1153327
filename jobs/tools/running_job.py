"""The running job that a command operates on: found on this machine without Ray, or on a Ray cluster.

`raymoe status` needs neither Ray nor torch where the job runs on this machine, so that it is quick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict

from actors.rpc.admin_client import AdminClient
from channels.grpc import tls
from errors import ChannelError, ConfigError, ResourceError, is_loss
from jobs.fleet.job_notices import local_jobs
from jobs.fleet.ray_address import local_addresses, named_address
from jobs.tools.jobs_found import HERE, JobsFound, RunningJob, described

_HOST_PORT = re.compile(r"(?:\[[^\]\s]+\]|[^:/\s\[\]]+):(?P<port>[0-9]{1,5})")


def find_jobs(
    *, coordinator: str | None, address: str | None, changes: bool = False, debug: bool = False
) -> JobsFound:
    """The jobs that a command may operate on.

    Args:
        coordinator: HOST:PORT of a job's coordinator.
        address: Address of a Ray cluster to look at; None takes RAY_ADDRESS, or without it this machine.
        changes: Whether the command changes a job, so that jobs without a notice count too, such as another
            user's.
        debug: Show the output of actors.

    Raises:
        ConfigError: The coordinator's address is not of this form.
        ChannelError: No coordinator answers there.
        ResourceError: There is no cluster at the address.
    """
    if coordinator is not None:
        return _found_at(coordinator)
    address = named_address(address)
    if address is None:
        return _found_here(changes=changes, debug=debug)
    from jobs.tools.cluster_jobs import jobs_on

    return jobs_on(address, debug=debug)


def _found_at(coordinator: str) -> JobsFound:
    """The job of the coordinator at HOST:PORT."""
    at = coordinator.removeprefix("grpc:")
    parts = _HOST_PORT.fullmatch(at)
    if parts is None or not 0 < int(parts["port"]) < 65536:
        raise ConfigError(f"--coordinator is {coordinator!r}; give HOST:PORT")
    try:
        return JobsFound([described(f"grpc:{at}")], f"at {at}")
    except ChannelError as error:
        if not is_loss(error) or tls.VARIABLE in str(error):  # that error says what to compare
            raise
        raise ChannelError(
            f"no coordinator answers at {at}; give --coordinator the address that the job prints, or leave "
            "it out to look for the job"
        ) from None


@contextmanager
def operated(job: RunningJob) -> Iterator[AdminClient]:
    """A client of a job.

    Raises:
        ResourceError: Another job answers at the address of its coordinator.
    """
    with closing(AdminClient(job.coordinator)) as client:
        if job.id and (there := client.describe())["id"] != job.id:
            raise ResourceError(
                f"{job.label} does not answer: {job.coordinator.removeprefix('grpc:')} is the address of "
                f"another job, {there['name'] or '?'} ({there['id'] or '?'}); nothing was done"
            )
        yield client


def _found_here(*, changes: bool, debug: bool) -> JobsFound:
    """The jobs of this machine: those with a notice, and those on Ray clusters that no notice names."""
    posted = local_jobs()
    jobs = [described(one.coordinator, RunningJob(**asdict(one), doing="does not answer")) for one in posted]
    if jobs and not changes:
        return JobsFound(jobs, HERE)
    covered = {one.cluster for one in posted}
    elsewhere = [address for address in local_addresses() if address not in covered]
    if not elsewhere:
        return JobsFound(jobs, HERE)
    from jobs.tools.cluster_jobs import jobs_of

    others = jobs_of(elsewhere, debug=debug)
    known = {job.id for job in jobs}  # a cluster can have several addresses
    jobs += [job for job in others.jobs if not job.id or job.id not in known]
    return JobsFound(jobs, HERE, silent=others.silent)


__all__ = ["find_jobs", "operated"]
