"""The running job that a command operates on: found on this machine without Ray, or on a Ray cluster.

Nothing here needs Ray or torch, so that `raymoe status` is quick where the job runs on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict

from actors.rpc.admin_client import AdminClient
from jobs.fleet.job_notices import local_jobs
from jobs.fleet.ray_address import VARIABLE
from jobs.tools.jobs_found import JobsFound, RunningJob, described


def find_jobs(*, coordinator: str | None, address: str | None, debug: bool = False) -> JobsFound:
    """The jobs that a command may operate on.

    Args:
        coordinator: HOST:PORT of a job's coordinator.
        address: Address of a Ray cluster to look at; None takes RAY_ADDRESS, or without it this machine.
        debug: Show the output of actors.

    Raises:
        ResourceError: There is no cluster at the address.
    """
    if coordinator is not None:
        at = coordinator if coordinator.startswith("grpc:") else f"grpc:{coordinator}"
        return JobsFound([described(at)], f"at {coordinator}")
    address = address or os.environ.get(VARIABLE) or None
    if address is None:
        posted = local_jobs()
        if posted:
            jobs = [
                described(one.coordinator, RunningJob(**asdict(one), doing="does not answer"))
                for one in posted
            ]
            return JobsFound(jobs, "on this machine")
    from jobs.tools.cluster_jobs import jobs_here, jobs_on

    if address is not None:
        return JobsFound(jobs_on(address, debug=debug), f"on the Ray cluster at {address}")
    return JobsFound(jobs_here(debug=debug), "on this machine")


@contextmanager
def operated(job: RunningJob) -> Iterator[AdminClient]:
    """A client of a job."""
    with closing(AdminClient(job.coordinator)) as client:
        yield client


__all__ = ["find_jobs", "operated"]
