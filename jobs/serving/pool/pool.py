"""What the replicas of a deployment share: expert hosts, their coordinator, the version of the weights."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from actors.coordinator.coordinator import Coordinator, HostPolicy, InitialWeights
from actors.host.expert_host import ExpertHost
from actors.messages.coordinator_state import CoordinatorState
from actors.rpc.coordinator_client import AdminClient, CoordinatorClient
from actors.rpc.host_client import HostClient
from errors import HostsChanged, RaymoeError, is_loss
from jobs.api.serving_metrics import ExpertFigures
from jobs.config.device_and_dtype import compute_device
from jobs.fleet.expert_hosts import host_threads, placement_spec
from jobs.fleet.fleet import Fleet
from jobs.serving.config import ServeConfig
from jobs.serving.pool.rollout import Rollout
from jobs.serving.served_model import ModelShape, require_room, serving_dtype, weights_version
from jobs.serving.versions import PoolMembership, ReplicaState, WantedVersions, WeightsVersion
from model.checkpoints.pretrained import PretrainedSource

_CONTROL_SECONDS = 30.0
_STATUS_SECONDS = 2.0
_TRIES = 4  # at loading other weights, while hosts come and go


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
        self._kind = ModelShape.of(config, weights)
        self._run = uuid.uuid4().hex[:12]
        version = WeightsVersion(epoch=0, directory=directory, name=weights_version(weights))
        self._rollout = Rollout(self._run, version)
        self._last_epoch = 0
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[dict[str, Any]]] = set()
        self._address: str | None = None
        self._coordinator: CoordinatorClient | None = None
        self._admin: AdminClient | None = None
        if cluster.expert_hosts:
            fleet = Fleet(
                cluster,
                coordinator=partial(build_serving_coordinator, config, version),
                host=partial(build_serving_host, config, weights),
            )
            self._actors.callback(fleet.close)
            self._address = fleet.open()
            self._coordinator = CoordinatorClient(self._address, timeout=_CONTROL_SECONDS)
            self._actors.callback(self._coordinator.close)
            self._admin = AdminClient(self._address, timeout=_STATUS_SECONDS)
            self._actors.callback(self._admin.close)

    async def where(self) -> str | None:
        """Address of the coordinator of the expert hosts; None without hosts."""
        return self._address

    async def join(self, name: str) -> PoolMembership:
        """A replica begins."""
        return PoolMembership(run=self._run, coordinator=self._address, version=self._rollout.join(name))

    async def leave(self, name: str) -> None:
        """A replica ends."""
        self._rollout.leave(name)

    async def lease(self, name: str) -> None:
        """Lasts as long as a replica is a member. Serve ends nobody with a call under way: so the pool
        outlives the trunk replicas, each of which is a member until its last request has ended."""
        await self._rollout.attend(name)

    async def ask(self, name: str, known: int) -> WantedVersions:
        """See `Rollout.ask`."""
        return await self._rollout.ask(name, known)

    async def report(self, name: str, standing: ReplicaState) -> None:
        """See `Rollout.report`."""
        self._rollout.report(name, standing)

    async def trunks(self) -> dict[str, str]:
        """See `Rollout.trunks`."""
        return self._rollout.trunks

    async def experts(self) -> ExpertFigures | None:
        """How the expert hosts stand; None without hosts.

        Raises:
            RaymoeError: the coordinator does not answer.
        """
        if self._admin is None:
            return None
        return ExpertFigures.of(await asyncio.to_thread(self._admin.status))

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
        self._kind.refuse_other(ModelShape.of(self._config, directory), directory)
        return weights_version(directory)

    async def _exchange(self, directory: str, name: str) -> None:
        """Both phases: until the end of the first, everything can be undone, and done again."""
        for tried in range(_TRIES):
            try:
                await self._load(directory, name)
                break
            except RaymoeError as error:
                if tried + 1 == _TRIES or not (isinstance(error, HostsChanged) or is_loss(error)):
                    raise
            await asyncio.sleep(2.0**tried)  # until a lost host, or the coordinator, is replaced
        await self._rollout.exchange()
        if self._coordinator is not None:
            # No replica is left whose step could ask for the old ones.
            with suppress(RaymoeError):
                await asyncio.to_thread(self._coordinator.retire, name)

    async def _load(self, directory: str, name: str) -> None:
        """Get other weights beside those in use, everywhere; nothing is left of a failure."""
        hosts = self._coordinator
        try:
            if hosts is not None:
                epoch = await asyncio.to_thread(hosts.load, directory, name)
            else:
                epoch = self._last_epoch = self._last_epoch + 1
            await self._rollout.prepare(WeightsVersion(epoch=epoch, directory=directory, name=name))
            if hosts is not None:
                await asyncio.to_thread(hosts.publish, epoch)
        except BaseException:
            self._rollout.abandon()
            if hosts is not None:
                with suppress(RaymoeError):  # what a host keeps, it drops at the next reload
                    await asyncio.to_thread(hosts.retire, self._rollout.uses.name)
            raise

    def __del__(self) -> None:
        self._actors.close()


def build_serving_host(config: ServeConfig, directory: Path, id: str) -> ExpertHost:
    """An expert host of this name, in its own process; it holds nothing yet.

    Args:
        directory: with weights of the served shape.
    """
    dtype = serving_dtype(config, directory)
    source = PretrainedSource(directory, dtype=dtype)
    model = source.config

    def open_source(other: str) -> PretrainedSource:
        return PretrainedSource(other, model, dtype=dtype)

    return ExpertHost(
        id,
        model,
        {},
        source,
        open_source=open_source,
        require_room=partial(require_room, who=f"expert host {id}"),
        dtype=dtype,
        threads=host_threads(config.cluster),
        device=compute_device(config.cluster.gpus_per_host, "cluster.gpus_per_host"),
    )


def build_serving_coordinator(
    config: ServeConfig, version: WeightsVersion, state: CoordinatorState | None
) -> Coordinator:
    """A coordinator that knows hosts, placement and weights, and no steps.

    Args:
        version: of the weights to begin with.
        state: of the coordinator before.
    """
    cluster = config.cluster
    return Coordinator(
        placement_spec(PretrainedSource(version.directory).config, cluster),
        HostPolicy(
            hosts=cluster.expert_hosts,
            dead_after=cluster.dead_after,
            autoscaling=cluster.autoscaling,
            rebalance_below=cluster.rebalance_below,
            channel=cluster.channel,
        ),
        control=partial(HostClient, timeout=_CONTROL_SECONDS),
        initial=InitialWeights(name=version.name, directory=version.directory),
        state=state,
    )


__all__ = ["ExpertPool", "build_serving_coordinator", "build_serving_host"]
