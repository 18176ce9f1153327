"""The Ray Serve application: the pool, the trunk replicas and the interface.

The pool is a deployment with one replica, which owns the actors of the coordinator and the expert hosts, so
that they end with it. A trunk replica gets the coordinator's address from the pool, and the routing table
from the coordinator; later it asks the pool which weights to use. The interface accepts requests and has
trunk replicas generate: Serve chooses the replica (`hold`), and the tokens come over a gRPC connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from actors.process_heap import freeze_heap
from actors.remote import listening_address
from actors.router.table_updates import CoordinatorTables
from errors import ConfigError, RaymoeError
from jobs.checkpoints.checkpoint_store import find_weights
from jobs.serving.config import ServeConfig
from jobs.serving.front.front import Front
from jobs.serving.interface.interface import Interface
from jobs.serving.names import FRONT, HEAD, INTERFACE, POOL, TRUNK
from jobs.serving.pool.pool import ExpertPool
from jobs.serving.pool_link import PoolLink
from jobs.serving.ports import ListenAddress
from jobs.serving.replica.held_leases import HeldLeases
from jobs.serving.replica.joining import join
from jobs.serving.replica.replica import Replica
from jobs.serving.replica.trunk_server import TrunkServer, TrunkService
from jobs.serving.served_model import model_name
from jobs.serving.version_follower import Follower
from jobs.serving.versions import ReplicaState

_MAX_ONGOING = 100_000  # no limit in practice: the engine's own queue refuses requests, with status 429
GRACE_SECONDS = 30.0
"""Seconds that requests in progress have to end when a process, or the deployment, ends."""

_FRONT_CHECK_SECONDS = 1.0  # a front that has died is replaced at once: nobody reaches the model meanwhile


class TrunkReplica:
    """One trunk replica as a Ray Serve deployment.

    Args:
        values: A `ServeConfig` as plain values.
        pool: Handle of the pool's deployment.
    """

    async def __init__(self, values: dict[str, Any], pool: DeploymentHandle) -> None:  # type: ignore[misc]  # Serve awaits it
        self._closing = ExitStack()  # closed in the reverse order
        config = ServeConfig.from_dict(values)
        link = PoolLink(pool, serve.get_replica_context().replica_tag)
        self._closing.callback(link.close)
        member, client, table = await join(link, config.cluster.call_timeout)
        if client is not None:
            self._closing.callback(client.close)
        self._follower = Follower(member.run, member.version, ask=link.ask, report=link.report)
        loaded: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
        self._following = asyncio.create_task(self._follower.follow(loaded))
        self._closing.callback(self._following.cancel)
        self._replica = await asyncio.to_thread(
            Replica,
            config,
            version=member.version,
            name=link.name,
            run=member.run,
            table=table,
            tables=None if client is None else CoordinatorTables(client),
        )
        self._closing.callback(self._replica.close)
        self._leases = HeldLeases()
        service = TrunkService(self._replica.service, self._leases, self._replica.status)
        self._server = TrunkServer(service, host=listening_address(config.cluster.interface))
        await self._server.start()
        self._closing.callback(service.close)
        link.address, link.serves = self._server.address, True
        await link.report(ReplicaState(uses=member.version.epoch))
        loaded.set_result(self._replica)
        freeze_heap()

    async def hold(self, name: str) -> AsyncGenerator[str, None]:
        """Open a lease of this name: yield the gRPC address, and return when no request uses the lease."""
        async for address in self._leases.hold(name, self._server.address):
            yield address

    def check_health(self) -> None:
        """Raise if this replica has to be replaced; called by Serve, which restarts unhealthy replicas."""
        if self._follower.orphaned:
            raise RaymoeError("the pool of expert hosts that this replica joined is no more")

    def __del__(self) -> None:
        self._closing.close()


def build_application(
    config: ServeConfig, directory: Path, *, front: ListenAddress | None = None, grpc: str | None = None
) -> Application:
    """The application for `serve.run`.

    Args:
        config: The configuration.
        directory: The directory with weights and tokenizer.
        front: Where the front listens; None leaves it out, and clients reach Serve's proxy itself.
        grpc: Host and port for gRPC without a front, on the head node; None is without.
    """
    serving, values = config.serving, config.to_dict()
    pool = serve.deployment(
        ExpertPool,
        name=POOL,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=2 * GRACE_SECONDS,
    ).bind(values, str(directory))
    options: dict[str, Any] = {"num_replicas": serving.replicas}
    if serving.autoscaling is not None:
        options = {"autoscaling_config": serving.autoscaling}
    trunk = serve.deployment(
        TrunkReplica,
        name=TRUNK,
        ray_actor_options={"num_cpus": serving.cpus_per_replica, "num_gpus": serving.gpus_per_replica},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=GRACE_SECONDS,
        **options,
    ).bind(values, pool)
    return serve.deployment(
        Interface,
        name=INTERFACE,
        num_replicas=serving.api_replicas,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=GRACE_SECONDS,
    ).bind(
        values,
        str(directory),
        serving.name or model_name(directory),
        pool,
        trunk,
        front=None if front is None else _front(config, front, pool),
        grpc=grpc,
    )


def _front(config: ServeConfig, listen: ListenAddress, pool: Application) -> Application:
    return serve.deployment(
        Front,
        name=FRONT,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=2 * GRACE_SECONDS,
        health_check_period_s=_FRONT_CHECK_SECONDS,
    ).bind(config.to_dict(), listen.to_dict(), pool, grace=GRACE_SECONDS)


def app(arguments: dict[str, Any]) -> Application:
    """Application builder for a Serve config file: `import_path: jobs.serving.serve:app`.

    Args:
        arguments: `checkpoint`, the sections of a `ServeConfig` and, for a front, `listen` (`ListenAddress`).

    Raises:
        RaymoeError: No checkpoint is given, it does not exist, or a field is invalid.
    """
    values = dict(arguments)
    checkpoint = values.pop("checkpoint", None)
    if not isinstance(checkpoint, str):
        raise RaymoeError("args.checkpoint is missing; give the directory of a checkpoint")
    given = values.pop("listen", None)
    listen = None if given is None else ListenAddress.from_dict(given)
    config = ServeConfig.of_arguments(values)
    if listen is None and config.serving.front.tls_certificate is not None:
        raise ConfigError(
            "args.serving.front.tls_certificate: it is the front that speaks TLS, and there is none without "
            "args.listen; set that as well, or leave the certificate out"
        )
    return build_application(config, find_weights(Path(checkpoint)).resolve(), front=listen)


__all__ = ["GRACE_SECONDS", "TrunkReplica", "app", "build_application"]
