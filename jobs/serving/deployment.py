"""The Ray Serve application: a pool of expert hosts, and replicas of the trunk in front of it.

The pool is a deployment with one replica that starts coordinator and expert hosts as actors of its own, so
that they end with it, whoever ends it. Trunk replicas ask it for the coordinator, and that one for the
routing table.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from actors.clients import CoordinatorClient, HostClient
from actors.coordinator import Coordinator
from actors.steps import TrainingPlan
from errors import RaymoeError
from jobs.api import build_api
from jobs.api.backend import Backend
from jobs.hosts import placement, running_hosts
from jobs.serving.config import ServeConfig
from jobs.serving.replica import Served, build_replica, build_serving_host
from jobs.weights import find_weights
from model.config import ModelConfig
from model.sources import read_hf_config

_MAX_ONGOING = 100_000  # our own queue says when it is full, with an answer that says so
_GRACE_SECONDS = 30.0


class ExpertPool:
    """Coordinator and expert hosts of a deployment.

    Args:
        values: a `ServeConfig` as plain values.
        directory: with the weights.
    """

    def __init__(self, values: dict[str, Any], directory: str) -> None:
        self._actors = ExitStack()
        config = ServeConfig.from_dict(values)
        cluster, weights = config.cluster, Path(directory)
        model = ModelConfig.from_hf(read_hf_config(weights))
        hosts = [partial(build_serving_host, config, weights, i) for i in range(cluster.expert_hosts)]
        self._run = uuid.uuid4().hex[:12]
        self._address = self._actors.enter_context(
            running_hosts(cluster, partial(_coordinator, model, cluster.expert_hosts), hosts)
        )

    async def where(self) -> tuple[str, str]:
        """The deployment's name for requests, and the coordinator's address."""
        return self._run, self._address

    async def lease(self) -> None:
        """Lasts until it is cancelled. Serve ends no replica with a call under way: so the pool outlives the
        trunk replicas, each of which holds a lease until its last request has ended."""
        await asyncio.Event().wait()

    def __del__(self) -> None:
        self._actors.close()


def _coordinator(model: ModelConfig, hosts: int) -> Coordinator:
    """A coordinator that knows hosts and placement, and no steps."""
    return Coordinator(
        TrainingPlan(steps=0, workers=1, learning_rate=0.0),
        owner=placement(model, hosts),
        n_layers=len(model.moe_layers),
        n_experts=model.n_routed_experts,
        n_hosts=hosts,
        control=partial(HostClient, timeout=_GRACE_SECONDS),
    )


def _backend() -> Backend:
    """Of the replica that this request has come to."""
    replica: TrunkReplica = serve.get_replica_context().servable_object
    return replica.backend


@serve.ingress(build_api(_backend))
class TrunkReplica:
    """A replica of the trunk, with the interface.

    Args:
        values: a `ServeConfig` as plain values.
        directory: with weights and tokenizer.
        pool: None keeps the experts in this process.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, values: dict[str, Any], directory: str, pool: DeploymentHandle | None
    ) -> None:
        self._closing = ExitStack()  # what it holds is given back in the reverse order
        config = ServeConfig.from_dict(values)
        context = serve.get_replica_context()
        run, table, refresh = "serve", None, None
        if pool is not None:
            self._closing.callback(pool.lease.remote().cancel)
            run, address = await pool.where.remote()
            client = CoordinatorClient(address, timeout=config.cluster.call_timeout)
            self._closing.callback(client.close)
            refresh = client.table
            table = await asyncio.to_thread(refresh)
        self._served: Served = await asyncio.to_thread(
            build_replica,
            config,
            Path(directory),
            name=context.replica_tag,
            run=run,
            table=table,
            refresh=refresh,
        )
        self._closing.callback(self._served.close)

    @property
    def backend(self) -> Backend:
        """What the interface works with."""
        return self._served.backend

    def __del__(self) -> None:
        self._closing.close()


def build_application(config: ServeConfig, directory: Path) -> Application:
    """The application for `serve.run`."""
    serving, cluster = config.serving, config.cluster
    values = config.to_dict()
    pool = None
    if cluster.expert_hosts:
        pool = serve.deployment(
            ExpertPool,
            name="experts",
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=_MAX_ONGOING,
            graceful_shutdown_timeout_s=2 * _GRACE_SECONDS,
        ).bind(values, str(directory))
    options: dict[str, Any] = {"num_replicas": serving.replicas}
    if serving.autoscaling is not None:
        options = {"autoscaling_config": serving.autoscaling}
    return serve.deployment(
        TrunkReplica,
        name="trunk",
        ray_actor_options={"num_cpus": serving.cpus_per_replica},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=_GRACE_SECONDS,
        **options,
    ).bind(values, str(directory), pool)


def app(arguments: dict[str, Any]) -> Application:
    """Application builder for a Serve config file: `import_path: jobs.serve:app`.

    Args:
        arguments: `checkpoint`, and the sections of a `ServeConfig`.

    Raises:
        RaymoeError: no checkpoint is named, it is not there, or a field is wrong.
    """
    values = dict(arguments)
    checkpoint = values.pop("checkpoint", None)
    if not isinstance(checkpoint, str):
        raise RaymoeError("args.checkpoint is missing; give the directory of a checkpoint")
    return build_application(ServeConfig.from_dict(values), find_weights(Path(checkpoint)).resolve())


__all__ = ["ExpertPool", "TrunkReplica", "app", "build_application"]
