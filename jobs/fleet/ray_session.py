"""The Ray cluster of a command: a running one, or one that is started for the command and ends with it."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from errors import ResourceError

_CONNECT_SECONDS = 10.0
_ADDRESS = "RAY_ADDRESS"  # Ray's own convention, set inside `ray job submit`


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
    return not ray.is_initialized() and (address or os.environ.get(_ADDRESS)) is None


@contextmanager
def ray_session(needs: ResourceNeeds, *, address: str | None, debug: bool = False) -> Iterator[bool]:
    """Connect to a cluster, or start one with the needed CPUs; yield whether it was started.

    Args:
        needs: Resources that the command needs.
        address: Address of a running cluster; None takes the one that this job was submitted to, or starts
            one.
        debug: Show the output of actors.

    Raises:
        ResourceError: There is no cluster at the address, or it lacks resources.
    """
    if ray.is_initialized():  # the caller's session, which the caller ends
        check_resources(needs)
        yield False
        return
    address = address or os.environ.get(_ADDRESS)
    level = logging.INFO if debug else logging.ERROR
    try:
        if address is None:
            ray.init(
                address="local",  # otherwise Ray joins a cluster that runs on this machine
                num_cpus=max(os.cpu_count() or 1, math.ceil(needs.cpus) + 1),
                _node_ip_address="127.0.0.1",  # the node's; some of Ray's own ports listen elsewhere
                include_dashboard=False,
                log_to_driver=debug,
                logging_level=level,
                configure_logging=True,
            )
        else:
            ray.init(address=address, log_to_driver=debug, logging_level=level)
    except Exception as error:  # Ray raises bare exceptions if a node does not start
        place, advice = (
            (f"at {address}", "check --address") if address else ("on this machine", "--debug says more")
        )
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ResourceError(f"no Ray cluster {place}: {first}; {advice}") from error
    try:
        check_resources(needs)
        yield address is None
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


def check_answers(address: str) -> None:
    """Check that a cluster listens at HOST:PORT; Ray itself would try for minutes.

    Addresses of other forms are not checked.

    Raises:
        ResourceError: Nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(f"no Ray cluster at {address} ({error}); check --address") from None


__all__ = ["ResourceNeeds", "check_answers", "check_resources", "embeds", "ray_session"]
