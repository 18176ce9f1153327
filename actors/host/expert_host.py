"""An expert host: a shard of the routed experts of all MoE layers, with gradients and moments in training.

`ExpertHost` is put together from one object for each task: requests of routers (`request_execution`), commits
of optimizer steps (`step_commits`), moves of expert state (`state_transfers`) and snapshots
(`snapshot_replication`, `snapshot_store`). All of them work on the same versions (`hosted_versions`).

A host that trains has one current version. A serving host may hold several versions of its weights, by epoch,
because routers change from one to another at different times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from actors.host.checkpoint_part import Pair, save_experts
from actors.host.host_settings import HostResources, HostSettings, InitialExperts
from actors.host.hosted_versions import HostedVersions
from actors.host.request_execution import RequestExecutor
from actors.host.snapshot_replication import SnapshotReplication
from actors.host.snapshot_store import SnapshotStore
from actors.host.state_transfers import StateTransfers, initial_version
from actors.host.step_commits import StepCommits
from actors.host.usage_meter import UsageMeter
from actors.messages.host_control import HostStats
from actors.messages.timeline import Timeline
from actors.messages.transfer_orders import Assembly, Blob, Pull, StoredCopy
from cluster.topology import HostInfo
from errors import ProtocolError
from model.config import ModelConfig


class ExpertHost:
    """Answers routers' requests and the coordinator's commands; implements `HostControl` and `Peer`.

    All methods may be called from several threads at the same time.

    Args:
        host_id: Name of the host.
        config: The model.
        initial: The experts that the host starts with.
        settings: How the host computes.
        resources: Checkpoints, memory and other hosts, for assemblies.
        timeline: Records when the host computes.

    Attributes:
        versions: The experts, by epoch.
        snapshots: Copies of state kept in memory for recovery.
        transfers: Moves of expert state.
        handle: Answers one request; see `RequestExecutor.handle`. Channels call it directly.
        answer: Answers a request in a mailbox; see `RequestExecutor.answer`. Mailboxes call it directly.

    Raises:
        CheckpointError: from the source of the initial experts.
    """

    def __init__(
        self,
        host_id: str,
        config: ModelConfig,
        initial: InitialExperts,
        *,
        settings: HostSettings | None = None,
        resources: HostResources | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        settings = settings or HostSettings()
        resources = resources or HostResources()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.id = host_id
        self.config = config
        self.settings = settings
        self.versions = HostedVersions(host_id, initial_version(config, settings, initial))
        self.snapshots = SnapshotStore(host_id, config, settings.dtype)
        self.transfers = StateTransfers(host_id, config, settings, self.versions, self.snapshots, resources)
        self._commits = StepCommits(host_id, self.versions, timeline)
        self._replication = SnapshotReplication(
            host_id, self.versions, self.snapshots, resources.connect, settings.commit_timeout
        )
        self._meter = UsageMeter(config)
        requests = RequestExecutor(host_id, config, settings, self.versions, self._meter, timeline)
        self.handle = requests.handle
        self.answer = requests.answer

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return torch.device(self.settings.device)

    @property
    def step(self) -> int:
        """Number of steps committed, which is the step that the current weights are for."""
        return self.versions.current.step

    @property
    def epoch(self) -> int:
        """Epoch of the current version."""
        return self.versions.current.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        """Keep the current version alone, under another epoch."""
        self.versions.rename(epoch)

    @property
    def epochs(self) -> tuple[int, ...]:
        """All epochs whose requests are answered."""
        return tuple(self.versions.held)

    def seal(self, step: int, epoch: int | None = None) -> None:
        self._commits.seal(step, epoch)

    def prepare(self, step: int, epoch: int | None = None) -> float:
        return self._commits.prepare(step, epoch)

    def commit(self, step: int, learning_rate: float, scale: float, epoch: int | None = None) -> None:
        self._commits.commit(step, learning_rate, scale, epoch)

    def save(self, directory: str, epoch: int | None = None) -> list[str]:
        """Write the host's weights and moments into a checkpoint; the names of the files.

        Of an expert with several holders, one holder writes.

        Raises:
            ProtocolError: the host is at another epoch.
            CheckpointError: the directory cannot be written to.
        """
        with self.versions.commit_lock:
            version = self.versions.at(epoch)
            weights = (one for one in version.weights() if version.speaks_for(one[0], one[1]))
            moments = (one for one in version.moments() if version.speaks_for(one[0], one[1]))
            return save_experts(Path(directory), self.id, weights, moments)

    def assemble(self, order: Assembly) -> None:
        self.transfers.assemble(order)

    def retain(self, *epochs: int) -> None:
        """Drop the experts of all epochs except these, the last of which becomes the current one.

        Requests under way complete with the version that they started with. In training the host continues
        from the current version's step and drops its snapshots of later steps.

        Raises:
            ProtocolError: the host does not hold one of them.
        """

        def drop_later_snapshots() -> None:
            if self.settings.trains:
                self.snapshots.rewind(self.step)

        self.versions.retain(epochs, on_switch=drop_later_snapshots)

    def fetch(self, pull: Pull) -> Iterator[bytes]:
        return self.transfers.fetch(pull)

    def snapshot(self, step: int, buddies: Sequence[HostInfo], epoch: int | None = None) -> None:
        """Copy the state of a step aside and send the copy to buddies; see `SnapshotReplication.snapshot`.

        Raises:
            ProtocolError: the host does not train, or is at another step or epoch.
        """
        if not self.settings.trains:
            raise ProtocolError(f"expert host {self.id} does not train: it has no step to copy")
        self._replication.snapshot(step, buddies, epoch)

    def store(self, frames: Iterator[bytes]) -> None:
        self.snapshots.store(frames)

    def put(self, blob: Blob) -> None:
        self.snapshots.put(blob)

    def get(self, name: str, step: int) -> Blob:
        return self.snapshots.get(name, step)

    def inventory(self) -> list[StoredCopy]:
        return self.snapshots.inventory()

    def loads(self) -> Tensor:
        """Token-expert pairs of forward passes since the host started: [L, E] int64, rows by `moe_layers`."""
        return self._meter.loads()

    def stats(self) -> HostStats:
        versions = self.versions
        current = versions.current
        kept = [version.ledger.kept() for version in versions.held.values()]
        requests, rows, busy = self._meter.read()
        shards = [layer.shard for layer in current.layers.values()]
        return HostStats(
            id=self.id,
            step=current.step,
            epoch=current.epoch,
            kept=sum(n for n, _ in kept),
            kept_bytes=sum(size for _, size in kept),
            parameters=sum(shard.w13.numel() + shard.w2.numel() for shard in shards),
            rows=rows,
            requests=requests,
            busy_seconds=busy,
            in_flight=self._meter.in_flight,
            epochs=tuple(versions.held),
            experts={index: len(layer.experts) for index, layer in current.layers.items()},
            failed_pushes=self.snapshots.failed_pushes(),
        )

    def gradients(self) -> list[Tensor]:
        """The flat gradient buffers, which workers all-reduce when each of them holds the experts."""
        return self.versions.current.gradients()

    def weights(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Every expert of the current version; see `HostedVersion.weights`."""
        return self.versions.current.weights()

    def moments(self) -> Iterator[tuple[int, int, Pair, Pair]]:
        """The moments of every expert of the current version; see `HostedVersion.moments`."""
        return self.versions.current.moments()

    def ping(self, timeout: float) -> None:
        pass

    def close(self) -> None:
        """Close the connections to other hosts."""
        self.versions.close()


__all__ = ["ExpertHost"]
