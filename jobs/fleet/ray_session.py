"""The Ray cluster of a command: a running one, or one that is started for the command and ends with it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import ray

from errors import ResourceError
from jobs.fleet.ray_address import named_address, running_address
from jobs.fleet.ray_start import connect, started_cluster
from jobs.fleet.waiting import Tell

_REPORT_SECONDS = 30.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceNeeds:
    """Resources that the actors of a command reserve.

    Attributes:
        cpus, gpus: Numbers of CPUs and GPUs.
        why, why_gpus: The fields of the configuration that add up to them, for errors.
    """

    cpus: float
    why: str
    gpus: float = 0
    why_gpus: str = ""


def embeds(address: str | None) -> bool:
    """Whether a command with this `--address` starts a cluster of its own."""
    return not ray.is_initialized() and named_address(address) is None


@contextmanager
def ray_session(
    needs: ResourceNeeds, *, address: str | None, debug: bool = False, tell: Tell | None = None
) -> Iterator[bool]:
    """Connect to a cluster, or start one with the needed CPUs; yield whether it was started.

    Args:
        needs: Resources that the command needs.
        address: Address of a running cluster, or `auto`; None takes the one that this job was submitted to,
            or starts one.
        debug: Show the output of actors.
        tell: Shows what the command waits for; None shows nothing.

    Raises:
        ResourceError: There is no cluster at the address, it does not start, or it lacks resources.
    """
    if ray.is_initialized():  # the caller's session, which the caller ends
        check_resources(needs)
        yield False
        return
    address = named_address(address)
    if address is None:
        cpus = max(os.cpu_count() or 1, math.ceil(needs.cpus) + 1)
        with started_cluster(cpus, check=partial(_await_resources, needs), debug=debug, tell=tell):
            yield True
        return
    connect(running_address(address), debug=debug, tell=tell)
    try:
        check_resources(needs)
        yield False
    finally:
        ray.shutdown()


def check_resources(needs: ResourceNeeds) -> None:
    """Check that the cluster has the needed resources; without them, actors would wait for ever.

    Raises:
        ResourceError: It lacks some; the message names the fields that ask for them.
    """
    free = ray.available_resources()
    for what, asked, why in (("CPU", needs.cpus, needs.why), ("GPU", needs.gpus, needs.why_gpus)):
        there = free.get(what, 0.0)
        if asked > there + 1e-6:
            raise ResourceError(
                f"the Ray cluster has {there:g} {what}s free, and {asked:g} are asked for: {why}; lower one "
                "of them or add nodes"
            )


def _await_resources(needs: ResourceNeeds) -> None:
    """Check the resources of a cluster that has just started, whose node may report them late."""
    deadline = time.monotonic() + _REPORT_SECONDS
    while True:
        try:
            check_resources(needs)
            return
        except ResourceError:
            there = ray.cluster_resources()
            late = there.get("CPU", 0.0) >= needs.cpus and there.get("GPU", 0.0) >= needs.gpus
            if not late or time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


__all__ = ["ResourceNeeds", "check_resources", "embeds", "ray_session"]
