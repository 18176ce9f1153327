"""`raymoe reload`: finds the served model that is meant, and replaces its weights without interrupting it.

The models of a Ray cluster are its Serve applications. One with expert hosts is called as its coordinator
says; one without goes by the name of its application, and by the address of its cluster as id.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from errors import ConfigError, RaymoeError, ResourceError
from jobs.checkpoints.checkpoint_store import find_weights
from jobs.fleet.ray_address import fit_cluster, local_addresses, named_address
from jobs.fleet.waiting import Tell
from jobs.serving.names import POOL
from jobs.serving.reload import coordinator_of, reload, served_applications
from jobs.tools.cluster_jobs import living_actors, on_cluster
from jobs.tools.jobs_found import HERE, JobsFound, RunningJob, described
from jobs.tools.running_job import find_jobs

_REPLICA = "SERVE_REPLICA::"  # begins the names of Serve's replicas; application, deployment and id follow


def reload_served(
    checkpoint: Path,
    *,
    address: str | None,
    job: str | None,
    application: str | None,
    tell: Tell,
    debug: bool = False,
) -> dict[str, Any]:
    """Change a served model to another checkpoint; returns when every replica uses it.

    Args:
        checkpoint: The checkpoint, a run's directory, or a Hugging Face directory.
        address: Address of the Ray cluster; None takes RAY_ADDRESS, or without it those of this machine.
        job: Name or id of the model's job; None takes the only one.
        application: Name of the Serve application; None takes any.
        tell: Called with a line that names the model, before it is changed.
        debug: Show the output of actors.

    Returns:
        The result of `ExpertPool.reload`, and the job.

    Raises:
        RaymoeError: There is no such model, or there are several; or the checkpoint does not fit, and the old
            weights stay in use.
    """
    directory = find_weights(checkpoint).resolve()
    if not debug:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if named_address(address) is None:
        address = _chosen_cluster(job, tell, debug=debug)
    with on_cluster(address, debug=debug) as at:
        models = _models_on(at, application)
        found = JobsFound(list(models), f"on the Ray cluster at {at}").chosen(job)
        tell(f"reloads {found.label}")
        return {**reload(directory, application=models[found]), "job": found.to_dict()}


def _chosen_cluster(job: str | None, tell: Tell, *, debug: bool) -> str | None:
    """Address of the cluster of this machine that serves the model; None if there is at most one cluster.

    Raises:
        RaymoeError: There is no such model, or there are several; the error lists them.
    """
    clusters = local_addresses()
    if len(clusters) < 2:
        return None
    serving = {}
    for address in clusters:
        with suppress(RaymoeError):  # it does not answer
            fit_cluster(address)
            if names := pools(living_actors(address)):
                serving[address] = names
    if not serving:
        raise ResourceError(
            f"{len(clusters)} Ray clusters run on this machine, and none of them serves a model; `--address` "
            "names another Ray cluster"
        )
    jobs = find_jobs(coordinator=None, address=None, changes=True, debug=debug)
    known = [one for one in jobs.jobs if one.cluster in serving and not one.trains]
    named = {one.cluster for one in known}
    known += [plain(name, at) for at, names in serving.items() if at not in named for name in names]
    found = JobsFound(known, HERE, silent=jobs.silent)
    chosen = found.chosen(job)
    if found.note:
        tell(found.note)
    return chosen.cluster


def pools(actors: Sequence[str]) -> list[str]:
    """Names of the Serve applications whose pool is among actors of these names."""
    found = [name.removeprefix(_REPLICA).split("#") for name in actors if name.startswith(_REPLICA)]
    return sorted({parts[0] for parts in found if len(parts) == 3 and parts[1] == POOL})


def plain(application: str, cluster: str, *, doing: str = "serves, without expert hosts") -> RunningJob:
    """A model without a coordinator, by the names that it goes by."""
    return RunningJob(coordinator="", id=cluster, name=application, cluster=cluster, doing=doing)


def _models_on(address: str, application: str | None) -> dict[RunningJob, str]:
    """The models of the cluster of this session, with their applications.

    Raises:
        ConfigError: The application is not there.
        ResourceError: There is none, or the application does not run.
    """
    states = served_applications()
    if application is not None:
        states = {name: state for name, state in states.items() if name == application}
    if alive := [name for name, state in states.items() if not state]:
        return {_model(name): name for name in alive}
    if application is None:
        raise ResourceError(f"no model is served on the Ray cluster at {address}; check --address")
    error, what = (ResourceError, f"is {states[application]}") if states else (ConfigError, "is not there")
    raise error(
        f"the Serve application {application!r} {what} on the Ray cluster at {address}; check --app and "
        "--address"
    )


def _model(application: str) -> RunningJob:
    cluster = ray.get_runtime_context().gcs_address
    try:
        coordinator = coordinator_of(application)
    except RaymoeError:
        return plain(application, cluster, doing="does not answer")
    if coordinator is None:
        return plain(application, cluster)
    at = f"grpc:{coordinator.removeprefix('grpc:')}"
    return described(
        at, RunningJob(coordinator=at, name=application, cluster=cluster, doing="does not answer")
    )


__all__ = ["plain", "pools", "reload_served"]
