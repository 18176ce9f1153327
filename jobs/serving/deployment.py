"""The Ray Serve application: a pool that replicas share, and replicas of the trunk with the interface.

The pool is a deployment with one replica that starts coordinator and expert hosts as actors of its own, so
that they end with it, whoever ends it. Trunk replicas ask it for the coordinator, and that one for the
routing table; later on they ask it which weights to use.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from actors.tables import CoordinatorTables
from errors import RaymoeError
from jobs.api import build_api
from jobs.api.backend import Backend
from jobs.serving.config import ServeConfig
from jobs.serving.follower import Follower
from jobs.serving.grpc_methods import GrpcMethods
from jobs.serving.membership import PoolLink
from jobs.serving.pool import ExpertPool
from jobs.serving.replica import Replica
from jobs.weights import find_weights

POOL = "experts"
"""Name of the pool's deployment, which `raymoe reload` asks."""

_MAX_ONGOING = 100_000  # our own queue says when it is full, with an answer that says so
_GRACE_SECONDS = 30.0


def _backend() -> Backend:
    """Of the replica that this request has come to."""
    replica: TrunkReplica = serve.get_replica_context().servable_object
    return replica.backend


@serve.ingress(build_api(_backend))
class TrunkReplica(GrpcMethods):
    """A replica of the trunk, with the interface.

    Args:
        values: a `ServeConfig` as plain values.
        title: the model's name for clients.
        pool: of the deployment.
        loopback: refuse gRPC calls from other machines.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, values: dict[str, Any], title: str, pool: DeploymentHandle, *, loopback: bool
    ) -> None:
        self._closing = ExitStack()  # what it holds is given back in the reverse order
        self._loopback = loopback
        config = ServeConfig.from_dict(values)
        link = PoolLink(pool, serve.get_replica_context().replica_tag)
        self._closing.callback(link.close)
        member, client, table = await link.join(config.cluster.call_timeout)
        if client is not None:
            self._closing.callback(client.close)
        self._follower = Follower(member.run, member.version, ask=link.ask, report=link.report)
        loaded: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
        self._following = asyncio.create_task(self._follower.follow(loaded))
        self._closing.callback(self._following.cancel)
        self._replica = await asyncio.to_thread(
            Replica,
            config,
            title=title,
            version=member.version,
            name=link.name,
            run=member.run,
            table=table,
            tables=None if client is None else CoordinatorTables(client),
        )
        self._closing.callback(self._replica.close)
        loaded.set_result(self._replica)

    @property
    def backend(self) -> Backend:
        """What the interface works with."""
        return self._replica.backend

    def check_health(self) -> None:
        """For Serve, which starts a replica anew that is not healthy."""
        if self._follower.orphaned:
            raise RaymoeError("the pool of expert hosts that this replica joined is no more")

    def __del__(self) -> None:
        self._closing.close()


def build_application(config: ServeConfig, directory: Path, *, loopback: bool = False) -> Application:
    """The application for `serve.run`.

    Args:
        directory: with weights and tokenizer.
        loopback: refuse gRPC calls from other machines: Serve's gRPC proxy listens on all interfaces.
    """
    serving, values = config.serving, config.to_dict()
    pool = serve.deployment(
        ExpertPool,
        name=POOL,
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
    ).bind(values, serving.name or directory.name, pool, loopback=loopback)


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


__all__ = ["POOL", "TrunkReplica", "app", "build_application"]
