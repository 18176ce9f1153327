"""The part of a deployment that all replicas share: expert hosts, coordinator, version of the weights."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from actors.coordinator.coordinator import Coordinator, HostPolicy, InitialWeights
from actors.coordinator.host_roster import steady
from actors.host import ExpertHost, HostResources, HostSettings, InitialExperts
from actors.messages.coordinator_state import CoordinatorState
from actors.rpc.admin_client import AdminClient
from actors.rpc.coordinator_client import CoordinatorClient
from actors.rpc.host_client import HostClient
from cluster.events import Event
from errors import HostsChanged, RaymoeError, is_loss
from jobs.api.serving_metrics import ExpertFigures
from jobs.config.device_and_dtype import compute_device
from jobs.fleet.expert_hosts import host_threads, placement_spec
from jobs.fleet.fleet import Fleet
from jobs.serving.config import ServeConfig
from jobs.serving.pool.process_losses import ProcessLosses
from jobs.serving.pool.process_watch import ProcessWatch
from jobs.serving.pool.rollout import Rollout
from jobs.serving.served_model import ModelShape, model_name, require_room, serving_dtype, weights_version
from jobs.serving.versions import PoolMembership, ReplicaState, WantedVersions, WeightsVersion
from model.checkpoints.pretrained import PretrainedSource

_CONTROL_SECONDS = 30.0
_STATUS_SECONDS = 2.0
_ASK_SECONDS = 5.0  # longest time until a replica's question is answered, and asked again
_TRIES = 4  # at loading other weights, while hosts come and go


class ExpertPool:
    """Owns the coordinator and the expert hosts of a deployment, if there are any, and changes its weights.

    Args:
        values: A `ServeConfig` as plain values.
        directory: The directory with the weights.

    Raises:
        RaymoeError: A host failed to start.
    """

    def __init__(self, values: dict[str, Any], directory: str) -> None:
        self._actors = ExitStack()
        self._config = config = ServeConfig.from_dict(values)
        weights, cluster = Path(directory), config.cluster
        self._kind = ModelShape.of(config, weights)
        self._run = uuid.uuid4().hex[:12]
        version = WeightsVersion(epoch=0, directory=directory, name=weights_version(weights))
        self._rollout = Rollout(self._run, version, pause=min(_ASK_SECONDS, cluster.dead_after / 2))
        self._last_epoch = 0
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[dict[str, Any]]] = set()
        self._address: str | None = None
        self._coordinator: CoordinatorClient | None = None
        self._admin: AdminClient | None = None
        recorder: CoordinatorClient | None = None
        if cluster.expert_hosts:
            fleet = Fleet(
                cluster,
                coordinator=partial(build_serving_coordinator, config, version),
                host=partial(build_serving_host, config, weights),
                name=config.serving.name or model_name(weights),
            )
            self._actors.callback(fleet.close)
            self._address = fleet.open()
            self._coordinator = CoordinatorClient(self._address, timeout=_CONTROL_SECONDS)
            self._actors.callback(self._coordinator.close)
            self._admin = AdminClient(self._address, timeout=_STATUS_SECONDS)
            self._actors.callback(self._admin.close)
            recorder = CoordinatorClient(self._address, timeout=_STATUS_SECONDS)
            self._actors.callback(recorder.close)
        self._losses = ProcessLosses(cluster.dead_after, clock=steady)
        self._watch = ProcessWatch(self._losses, recorder)
        self._actors.callback(self._watch.stop)

    async def where(self) -> str | None:
        """Address of the coordinator; None without expert hosts."""
        return self._address

    async def events(self, run: str, known: int) -> tuple[str, int, list[Event]]:
        """Deaths and replacements of processes, and what happens to the front and to the API keys.

        Args:
            run, known: The first two values of the last answer.

        Returns:
            The run of this pool, the number of its events so far, and those that the caller does not know.
        """
        events = self._watch.events
        return self._run, events.recorded, events.after(known if run == self._run else 0)

    async def join(self, name: str, actor: str, *, interface: bool) -> PoolMembership:
        """Add a replica.

        Args:
            name: Its name.
            actor: Id of its Ray actor.
            interface: Whether it is a process of the interface, not a trunk replica.
        """
        self._losses.join(name, actor, interface=interface)
        self._watch.start()
        return PoolMembership(run=self._run, coordinator=self._address, version=self._rollout.join(name))

    async def leave(self, name: str) -> None:
        """Remove a replica."""
        self._losses.leave(name)
        self._rollout.leave(name)

    async def lease(self, name: str) -> None:
        """Return when a replica is no longer a member.

        Serve does not end a deployment that has a running call, so these calls keep the pool alive until the
        last trunk replica has completed its requests and left.
        """
        await self._rollout.attend(name)

    async def ask(self, name: str, known: int) -> WantedVersions:
        """The versions that a replica should use and load, as `Rollout.ask` returns them."""
        with self._losses.question(name):
            return await self._rollout.ask(name, known)

    async def report(self, name: str, state: ReplicaState) -> None:
        """Record the state of a replica."""
        self._rollout.report(name, state)
        if state.serves:
            self._losses.serve(name)

    async def note(self, kind: str, text: str) -> None:
        """Record an event of a process of the deployment; what several of them tell at a time, once."""
        self._losses.note(kind, text)

    async def close(self) -> None:
        """Have the interface refuse requests; return when those in progress have been answered."""
        self._losses.close()
        await self._rollout.close()

    async def drained(self, name: str) -> None:
        """Record that a process of the interface has no request in progress and accepts none."""
        self._rollout.drained(name)

    async def trunks(self) -> dict[str, str]:
        """Addresses of the trunk replicas by name."""
        return self._rollout.trunks

    async def experts(self) -> ExpertFigures | None:
        """Figures of the expert hosts; None without hosts.

        Raises:
            RaymoeError: The coordinator does not answer.
        """
        if self._admin is None:
            return None
        return ExpertFigures.of(await asyncio.to_thread(self._admin.status))

    async def reload(self, directory: str) -> dict[str, Any]:
        """Change all replicas and hosts to another checkpoint; it is completed even if the caller
        disconnects.

        Returns:
            version, previous, replicas, expert_hosts, seconds.

        Raises:
            RaymoeError: The checkpoint does not fit or cannot be loaded; the old weights stay in use.
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
        """The name of a checkpoint's weights, after checking that they fit."""
        self._kind.refuse_other(ModelShape.of(self._config, directory), directory)
        return weights_version(directory)

    async def _exchange(self, directory: str, name: str) -> None:
        """Load the weights everywhere, which can be undone and repeated, then have all replicas use them."""
        for tried in range(_TRIES):
            try:
                await self._load(directory, name)
                break
            except RaymoeError as error:
                if tried + 1 == _TRIES or not (isinstance(error, HostsChanged) or is_loss(error)):
                    raise
            await asyncio.sleep(2.0**tried)  # time for a lost host, or the coordinator, to be replaced
        await self._rollout.exchange()
        if self._coordinator is not None:
            # No step of any replica can need the old weights any more.
            with suppress(RaymoeError):
                await asyncio.to_thread(self._coordinator.retire, name)

    async def _load(self, directory: str, name: str) -> None:
        """Load other weights beside those in use on all hosts and replicas; a failure is undone."""
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
                with suppress(RaymoeError):  # weights that a host still has are dropped at the next reload
                    await asyncio.to_thread(hosts.retire, self._rollout.uses.name)
            raise

    def __del__(self) -> None:
        self._actors.close()


def build_serving_host(config: ServeConfig, directory: Path, id: str) -> ExpertHost:
    """An expert host, in its own process, without experts yet.

    Args:
        config: The configuration of the deployment.
        directory: A directory with weights of the served shape.
        id: Name of the host.
    """
    dtype = serving_dtype(config, directory)
    source = PretrainedSource(directory, dtype=dtype)
    model = source.config

    def open_source(other: str) -> PretrainedSource:
        return PretrainedSource(other, model, dtype=dtype)

    return ExpertHost(
        id,
        model,
        InitialExperts(source=source),
        settings=HostSettings(
            dtype=dtype,
            threads=host_threads(config.cluster),
            device=compute_device(config.cluster.gpus_per_host, "cluster.gpus_per_host"),
        ),
        resources=HostResources(
            open_source=open_source, require_room=partial(require_room, who=f"expert host {id}")
        ),
    )


def build_serving_coordinator(
    config: ServeConfig, version: WeightsVersion, state: CoordinatorState | None
) -> Coordinator:
    """The coordinator of a deployment: hosts, placement and weights, without training steps.

    Args:
        config: The configuration of the deployment.
        version: The version of the weights to start with.
        state: The state of the coordinator before this one.
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
