"""What the replicas of a deployment share: expert hosts, their coordinator, the version of the weights."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actors.clients import CoordinatorClient, HostClient
from actors.coordinator import Coordinator
from actors.expert_host import ExpertHost
from actors.steps import TrainingPlan
from errors import RaymoeError
from jobs.hosts import experts_of, host_threads, placement, running_hosts
from jobs.serving.config import ServeConfig
from jobs.serving.rollout import Rollout, Standing, Wanted
from jobs.serving.weights import Kind, Version, require_room, serving_dtype, weights_version
from model.checkpoint import PretrainedSource
from model.config import ModelConfig

_CONTROL_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What a replica begins with.

    Attributes:
        run: the deployment's name for requests to hosts.
        coordinator: its address; None keeps the experts in the replica.
        version: of the weights.
    """

    run: str
    coordinator: str | None
    version: Version


class ExpertPool:
    """Coordinator and expert hosts of a deployment, if it has some, and the one who changes its weights.

    Args:
        values: a `ServeConfig` as plain values.
        directory: with the weights.

    Raises:
        RaymoeError: what a host failed with.
    """

    def __init__(self, values: dict[str, Any], directory: str) -> None:
        self._actors = ExitStack()
        self._config = config = ServeConfig.from_dict(values)
        weights, cluster = Path(directory), config.cluster
        self._kind = Kind.of(config, weights)
        self._run = uuid.uuid4().hex[:12]
        version = Version(epoch=0, directory=directory, name=weights_version(weights))
        self._rollout = Rollout(self._run, version)
        self._last_epoch = 0
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[dict[str, Any]]] = set()
        self._address: str | None = None
        self._coordinator: CoordinatorClient | None = None
        if cluster.expert_hosts:
            hosts = [partial(build_serving_host, config, weights, i) for i in range(cluster.expert_hosts)]
            coordinator = partial(_coordinator, self._kind.model, cluster.expert_hosts, version.name)
            self._address = self._actors.enter_context(running_hosts(cluster, coordinator, hosts))
            self._coordinator = CoordinatorClient(self._address, timeout=_CONTROL_SECONDS)
            self._actors.callback(self._coordinator.close)

    async def join(self, name: str) -> Membership:
        """A replica begins."""
        return Membership(run=self._run, coordinator=self._address, version=self._rollout.join(name))

    async def leave(self, name: str) -> None:
        """A replica ends."""
        self._rollout.leave(name)

    async def lease(self, name: str) -> None:
        """Lasts as long as a replica is a member. Serve ends nobody with a call under way: so the pool
        outlives the trunk replicas, each of which is a member until its last request has ended."""
        await self._rollout.attend(name)

    async def ask(self, name: str, known: int) -> Wanted:
        """See `Rollout.ask`."""
        return await self._rollout.ask(name, known)

    async def report(self, name: str, standing: Standing) -> None:
        """See `Rollout.report`."""
        self._rollout.report(name, standing)

    async def trunks(self) -> dict[str, str]:
        """See `Rollout.trunks`."""
        return self._rollout.trunks

    async def reload(self, directory: str) -> dict[str, Any]:
        """Change all replicas and hosts to another checkpoint; goes on to its end if the caller goes away.

        Returns:
            version, previous, replicas, expert_hosts, seconds.

        Raises:
            RaymoeError: the checkpoint does not fit or cannot be loaded; the old one goes on being served.
        """
        work = asyncio.create_task(self._in_turn(directory))
        self._reloads.add(work)
        work.add_done_callback(self._reloads.discard)
        return await asyncio.shield(work)

    async def _in_turn(self, directory: str) -> dict[str, Any]:
        async with self._reloading:
            began, old = time.monotonic(), self._rollout.uses
            name = await asyncio.to_thread(self._checked, Path(directory))
            if name != old.name:
                await self._exchange(directory, name)
            return {
                "version": name,
                "previous": old.name,
                "replicas": self._rollout.replicas,
                "expert_hosts": self._config.cluster.expert_hosts,
                "seconds": round(time.monotonic() - began, 3),
            }

    def _checked(self, directory: Path) -> str:
        """The name of a checkpoint's weights, if they fit."""
        self._kind.refuse_other(Kind.of(self._config, directory), directory)
        return weights_version(directory)

    async def _exchange(self, directory: str, name: str) -> None:
        """Both phases: until the end of the first, everything can be undone."""
        hosts = self._coordinator
        try:
            if hosts is not None:
                epoch = await asyncio.to_thread(hosts.load, directory, name)
            else:
                epoch = self._last_epoch = self._last_epoch + 1
            await self._rollout.prepare(Version(epoch=epoch, directory=directory, name=name))
        except BaseException:
            self._rollout.abandon()
            if hosts is not None:
                with suppress(RaymoeError):  # what a host keeps, it drops at the next reload
                    await asyncio.to_thread(hosts.retire)
            raise
        if hosts is not None:
            await asyncio.to_thread(hosts.publish, epoch)
        await self._rollout.exchange()
        if hosts is not None:
            # No replica is left whose step could ask for the old ones.
            with suppress(RaymoeError):
                await asyncio.to_thread(hosts.retire)

    def __del__(self) -> None:
        self._actors.close()


def build_serving_host(config: ServeConfig, directory: Path, index: int) -> ExpertHost:
    """Expert host number `index`, in its own process."""
    dtype = serving_dtype(config, directory)
    source = PretrainedSource(directory, dtype=dtype)
    model = source.config
    name, experts = f"host-{index}", experts_of(model, config.cluster, index)

    def open_source(other: str) -> PretrainedSource:
        each = 3 * model.hidden_size * model.moe_intermediate_size * dtype.itemsize
        require_room(sum(map(len, experts.values())) * each, f"expert host {name}")
        return PretrainedSource(other, model, dtype=dtype)

    return ExpertHost(
        name,
        model,
        experts,
        source,
        open_source=open_source,
        dtype=dtype,
        threads=host_threads(config.cluster),
    )


def _coordinator(model: ModelConfig, hosts: int, weights: str) -> Coordinator:
    """A coordinator that knows hosts, placement and weights, and no steps."""
    return Coordinator(
        TrainingPlan(steps=0, workers=1, learning_rate=0.0),
        holders=placement(model, hosts),
        n_layers=len(model.moe_layers),
        n_experts=model.n_routed_experts,
        n_hosts=hosts,
        control=partial(HostClient, timeout=_CONTROL_SECONDS),
        weights=weights,
    )


__all__ = ["ExpertPool", "Membership", "build_serving_host"]
