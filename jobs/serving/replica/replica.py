"""A trunk replica: its weights, its engine and its router, and the exchange of its weights."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

import torch

from actors.router import Router, RouterSettings
from actors.router.engine_lanes import EngineLanes
from actors.router.routing import Tables
from actors.rpc.host_client import HostClient
from cluster.topology import RoutingTable
from engine.engine import Engine
from engine.service import EngineService
from errors import ProtocolError, RaymoeError
from jobs.data.tokenizer import load_tokenizer
from jobs.fleet.expert_hosts import connector
from jobs.serving.config import ServeConfig
from jobs.serving.replica.replica_weights import ReplicaWeights, load_beside, load_weights
from jobs.serving.versions import WeightsVersion
from model.experts.protocols import Experts
from protos.trunk_pb2 import TrunkStatus

_HEALTH_SECONDS = 1.0  # longest age of an answer


class Replica:
    """One trunk replica.

    Args:
        config: The configuration of the deployment.
        version: The version of the weights to start with.
        name: Name of the replica, unique within the deployment.
        run: Name of the deployment in requests to expert hosts.
        table: The routing table for this version; None loads the experts into this process.
        tables: Source of newer routing tables.

    Raises:
        CheckpointError: The weights are incomplete or of another architecture.
        DataError: There is no tokenizer.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        version: WeightsVersion,
        name: str,
        run: str,
        table: RoutingTable | None = None,
        tables: Tables | None = None,
    ) -> None:
        serving, directory = config.serving, Path(version.directory)
        if serving.threads is not None:
            torch.set_num_threads(serving.threads)
        self._config, self._tables = config, tables
        self._prepared: tuple[WeightsVersion, ReplicaWeights] | None = None
        weights = load_weights(config, directory, experts=table is None)
        self._router: Router | None = None
        if table is not None:
            self._router = Router(
                name=name,
                run=run,
                config=weights.trunk.config,
                table=table,
                connect=connector(config.cluster, weights.trunk.embedding.device),
                settings=RouterSettings(
                    lanes=2,
                    timeout=config.cluster.call_timeout,
                    patience=config.cluster.call_timeout,
                    hedge_after=config.cluster.hedge_after,
                    watch=True,
                ),
                tables=tables,
            )
        self._lanes = None if self._router is None else EngineLanes(self._router)
        lanes = self._lanes
        experts = self._reach(weights)
        text = load_tokenizer(directory, weights.trunk.config.vocab_size)
        self._engine = Engine(
            weights.trunk,
            experts,
            serving.engine_settings(),
            end_of_text=list(text.ends),
            vocabulary=text.vocabulary,
            on_step=None if lanes is None else lanes.begin,
        )
        try:
            self._engine.warm_up()
        except RaymoeError:  # a host does not answer: /health reports it, and requests try again
            if lanes is not None:
                lanes.abandon()
        self.service = EngineService(
            self._engine,
            text.tokenizer,
            version=version.name,
            abandon=None if lanes is None else lanes.abandon,
        )
        self._health = HostsHealth(self._router, timeout=5.0)

    def status(self, health: bool) -> TrunkStatus:
        """The replica's status for trunk.proto.

        Args:
            health: Also ask the expert hosts.
        """
        engine, pool, stats = self._engine, self._engine.pool, self._engine.stats
        running, waiting = self.service.load
        return TrunkStatus(
            version=self.service.version,
            running=running,
            waiting=waiting,
            pages_held=pool.held,
            pages=pool.n_pages,
            preemptions=engine.scheduler.preemptions,
            drafts=stats.proposed[0],
            draft_tokens=sum(list(stats.proposed.values())),
            accepted_tokens=sum(list(stats.accepted.values())),
            requests=self.service.taken,
            unwell=(self._health() or "") if health else "",
        )

    async def prepare(self, version: WeightsVersion) -> None:
        """Load a version beside the one in use.

        Raises:
            CheckpointError: It is incomplete or of another shape.
            ResourceError: There is not enough memory.
        """
        load = partial(load_beside, self._config, Path(version.directory), experts=self._router is None)
        self._prepared = version, await asyncio.to_thread(load)

    async def exchange(self, version: WeightsVersion) -> None:
        """Use the prepared version from the next step on; running requests continue with it.

        Raises:
            ProtocolError: The hosts' routing table is for other weights.
        """
        assert self._prepared is not None and self._prepared[0] == version
        table = None
        if self._tables is not None:
            table = await asyncio.to_thread(self._tables.newest, version.name)
            if table.weights != version.name:
                raise ProtocolError(
                    f"the hosts use {table.weights}, and this replica should use {version.name}"
                )
        done = self.service.exchange(partial(self._use, self._prepared[1], table), version.name)
        await asyncio.wrap_future(done)
        self._prepared = None

    def forget(self) -> None:
        """Drop the prepared version."""
        self._prepared = None

    def close(self) -> None:
        """End the engine's thread and close all connections to expert hosts."""
        self.service.close()
        if self._router is not None:
            self._router.close()

    def _use(self, weights: ReplicaWeights, table: RoutingTable | None) -> None:
        """Exchange trunk and routing table together; runs in the engine's thread, between two steps."""
        if self._router is not None:
            assert table is not None
            self._router.set_table(table)
        self._engine.replace(weights.trunk, self._reach(weights))

    def _reach(self, weights: ReplicaWeights) -> Experts:
        """The experts of a trunk: lanes to the expert hosts, or experts in this process."""
        experts = self._lanes or weights.experts
        assert experts is not None
        return experts


class HostsHealth:
    """Checks that every expert has a host in the router's table, and that the hosts answer.

    It does so at most once a second.
    """

    def __init__(self, router: Router | None, *, timeout: float) -> None:
        self._router, self._timeout = router, timeout
        self._clients: dict[str, HostClient] = {}
        self._asked = float("-inf")
        self._reason: str | None = None

    def __call__(self) -> str | None:
        """Which experts have no host, or the error of a host that does not answer; None if all is well."""
        if time.monotonic() - self._asked > _HEALTH_SECONDS:
            self._reason = self._ask()
            self._asked = time.monotonic()
        return self._reason

    def _ask(self) -> str | None:
        if self._router is None:
            return None
        table = self._router.table
        hosts, experts = table.hosts, [holders for row in table.holders for holders in row]
        for gone in self._clients.keys() - {host.id for host in hosts}:
            self._clients.pop(gone).close()
        for host in hosts:
            try:
                if host.id not in self._clients:
                    self._clients[host.id] = HostClient(host, timeout=self._timeout)
                self._clients[host.id].stats()
            except RaymoeError as error:
                return str(error)
        if lacking := sum(not holders for holders in experts):
            return (
                f"{lacking} of {len(experts)} experts have no live expert host; requests wait until hosts "
                "have loaded them"
            )
        return None


__all__ = ["HostsHealth", "Replica"]
