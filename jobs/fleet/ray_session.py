"""The Ray cluster that a command works on: a running one, or one of its own for as long as it runs."""

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
    """What the actors of a command reserve.

    Attributes:
        why, why_gpus: the fields of the configuration that it is the sum of.
    """

    cpus: float
    why: str
    gpus: float = 0
    why_gpus: str = ""


def embeds(address: str | None) -> bool:
    """Whether a command given this address would start a cluster of its own."""
    return not ray.is_initialized() and (address or os.environ.get(_ADDRESS)) is None


@contextmanager
def ray_session(needs: ResourceNeeds, *, address: str | None, debug: bool = False) -> Iterator[bool]:
    """Connect to a cluster, or start an embedded one with the CPUs that are needed; whether it is embedded.

    Args:
        address: of a running cluster; None takes the one that this job was submitted to, else embeds one.
        debug: show what actors write.

    Raises:
        ResourceError: no cluster at the address, or it cannot give what is needed.
    """
    if ray.is_initialized():  # a caller's own session, which is the caller's to end
        check_resources(needs)
        yield False
        return
    address = address or os.environ.get(_ADDRESS)
    level = logging.INFO if debug else logging.ERROR
    try:
        if address is None:
            ray.init(
                address="local",  # without it, Ray would join whatever cluster runs on this machine
                num_cpus=max(os.cpu_count() or 1, math.ceil(needs.cpus) + 1),
                _node_ip_address="127.0.0.1",  # of the node; some of Ray's own ports listen elsewhere
                include_dashboard=False,
                log_to_driver=debug,
                logging_level=level,
                configure_logging=True,
            )
        else:
            ray.init(address=address, log_to_driver=debug, logging_level=level)
    except Exception as error:  # a node that does not come up is a bare one
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
    """Refuse what would wait for ever for its actors to be placed.

    Raises:
        ResourceError: naming the fields that ask for more than there is.
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
    """Ray tries for minutes to reach a cluster that is not there.

    Raises:
        ResourceError: nothing listens at HOST:PORT; an address of another form is Ray's to find.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(f"no Ray cluster at {address} ({error}); check --address") from None


__all__ = ["ResourceNeeds", "check_answers", "check_resources", "embeds", "ray_session"]
