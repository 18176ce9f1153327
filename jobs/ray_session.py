"""The Ray cluster that a command works on: a running one, or one of its own for as long as it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from errors import ResourceError
from jobs.config import RunConfig

_ADDRESS = "RAY_ADDRESS"  # Ray's own convention, set inside `ray job submit`


@contextmanager
def ray_session(config: RunConfig, *, address: str | None, debug: bool = False) -> Iterator[None]:
    """Connect to a cluster, or start an embedded one with the CPUs that the run asks for.

    Args:
        address: of a running cluster; None takes the one that this job was submitted to, else embeds one.
        debug: show what actors write.

    Raises:
        ResourceError: no cluster at the address, or it cannot give what the configuration asks for.
    """
    if ray.is_initialized():  # a caller's own session, which is the caller's to end
        check_resources(config)
        yield
        return
    address = address or os.environ.get(_ADDRESS)
    level = logging.INFO if debug else logging.ERROR
    try:
        if address is None:
            cpus = max(os.cpu_count() or 1, -(-int(100 * needed_cpus(config)) // 100) + 1)
            ray.init(
                address="local",  # without it, Ray would join whatever cluster runs on this machine
                num_cpus=cpus,
                _node_ip_address="127.0.0.1",  # nothing of an embedded cluster listens elsewhere
                include_dashboard=False,
                log_to_driver=debug,
                logging_level=level,
                configure_logging=True,
            )
        else:
            ray.init(address=address, log_to_driver=debug, logging_level=level)
    except (ConnectionError, RuntimeError, ValueError) as error:
        place = f"at {address}" if address else "on this machine"
        first = str(error).strip().splitlines()[0]
        raise ResourceError(f"no Ray cluster {place}: {first}; check --address") from error
    try:
        check_resources(config)
        yield
    finally:
        ray.shutdown()


def needed_cpus(config: RunConfig) -> float:
    """CPUs that the actors of a run reserve."""
    training, cluster = config.training, config.cluster
    return training.workers * training.cpus_per_worker + cluster.expert_hosts * cluster.cpus_per_host


def check_resources(config: RunConfig) -> None:
    """Refuse a run that would wait for ever for its actors to be placed.

    Raises:
        ResourceError: naming the fields that ask for more than there is.
    """
    training, cluster = config.training, config.cluster
    have = ray.available_resources()
    if needed_cpus(config) > have.get("CPU", 0.0) + 1e-6:
        raise ResourceError(
            f"the Ray cluster has {have.get('CPU', 0.0):g} CPUs free, the run asks for "
            f"{needed_cpus(config):g}: training.workers ({training.workers}) x training.cpus_per_worker "
            f"({training.cpus_per_worker:g}) + cluster.expert_hosts ({cluster.expert_hosts}) x "
            f"cluster.cpus_per_host ({cluster.cpus_per_host:g}); lower one of them or add nodes"
        )
    gpus = cluster.expert_hosts * cluster.gpus_per_host
    if gpus > have.get("GPU", 0.0) + 1e-6:
        raise ResourceError(
            f"the Ray cluster has {have.get('GPU', 0.0):g} GPUs free, cluster.expert_hosts "
            f"({cluster.expert_hosts}) x cluster.gpus_per_host ({cluster.gpus_per_host:g}) ask for {gpus:g}"
        )


__all__ = ["check_resources", "needed_cpus", "ray_session"]
