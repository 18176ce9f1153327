"""The expert hosts in a training step: what they are told, all of them at once, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from torch import Tensor

from actors.coordinator.common_snapshot import DECISIONS, buddies
from actors.coordinator.host_roster import failed_on
from actors.coordinator.placement_changes import Elastic
from actors.messages.steps import HostControl, StepDecision
from actors.messages.transfer_orders import EXPERTS, Blob
from cluster.topology import HostInfo
from errors import ProtocolError, RaymoeError, ResourceError

_T = TypeVar("_T")


class StepHosts:
    """The hosts of a run, or none where workers hold the experts.

    One thread at a time may call, `save` apart: whoever decides, or brings the run back.
    """

    def __init__(self, elastic: Elastic | None) -> None:
        self.elastic = elastic
        self._commits: list[tuple[HostInfo, Future[None]]] = []
        self._kept: tuple[int, dict[str, str]] = (-1, {})  # the last snapshot: step, host -> its keeper
        self._pool = ThreadPoolExecutor(64, thread_name_prefix="steps")

    @property
    def epoch(self) -> int:
        """Of the experts in use."""
        current = None if self.elastic is None else self.elastic.versions.current
        return 0 if current is None else current.epoch

    def prepare(self, step: int) -> float:
        """Let all seal their gradients; the sum of their squares.

        Raises:
            RaymoeError: a host did not commit the step before, or does not prepare this one.
        """
        self.finish()
        epoch = self.epoch
        if self._shared():
            self._on_all("seal its gradients", lambda host: _at(epoch, host, host.seal, step))
            return sum(self._on_all("prepare", lambda host: host.prepare(step, epoch)))
        return sum(self._on_all("prepare", lambda host: _at(epoch, host, host.prepare, step)))

    def commit(self, decision: StepDecision, failed: Callable[[str, BaseException], None]) -> None:
        """Let all apply the step; nobody waits, and `failed` is told of a host that does not."""

        epoch = self.epoch

        def commit(info: HostInfo, host: HostControl) -> None:
            try:
                host.commit(decision.step, decision.learning_rate, decision.scale, epoch)
            except Exception as error:
                failed(f"expert host {info.id} did not commit step {decision.step}: {error}", error)
                raise

        self._commits = [(info, self._submit(commit, info, host)) for info, host in self._members()]

    def finish(self) -> None:
        """Wait until every host has committed the step before.

        Raises:
            RaymoeError: one did not.
        """
        errors = [(i.id, error) for i, commit in self._commits if (error := commit.exception()) is not None]
        if errors:
            raise failed_on("commit the last step", errors) from errors[0][1]

    def settle(self) -> None:
        """Wait for whatever is under way, however it ends: nothing of it may come later."""
        commits, self._commits = self._commits, []
        for _, commit in commits:
            with suppress(Exception):
                commit.result()

    def reshape(self, why: str, step: int) -> float:
        """Let experts move, once all hosts have committed; the seconds that it took."""
        assert self.elastic is not None
        self.finish()
        return self.elastic.reshape(why, step=step)

    def snapshot(self, step: int, bias: Tensor) -> None:
        """Let hosts keep their state once they have committed; nobody waits for it but the next commit."""
        assert self.elastic is not None
        members = self.elastic.hosts()
        keepers = buddies([(id, info.node) for id, (info, _) in members.items()])
        self._kept = (step, keepers)
        blob = Blob(name=DECISIONS, step=step, tensors={"bias": bias})
        before, epoch = {info.id: commit for info, commit in self._commits}, self.epoch

        def keep(id: str, host: HostControl) -> None:
            commit, keeper = before.get(id), keepers.get(id)
            with suppress(RaymoeError):  # without a copy there is one step less to go back to
                if commit is not None:
                    commit.result()
                host.snapshot(step, [members[keeper][0]] if keeper is not None else [], epoch)
                host.put(blob)

        copies = [(info, self._submit(keep, id, host)) for id, (info, host) in members.items()]
        self._commits = [*self._commits, *copies]

    def copied(self) -> bool:
        """Whether all copies of the last snapshot are with their keepers, or could not be sent.

        Hosts keep two steps: a third one too soon would leave none that all of them have.
        """
        step, keepers = self._kept
        members = {} if self.elastic is None else self.elastic.hosts()
        for id, keeper in keepers.items():
            with suppress(RaymoeError):
                for stored in members[id][1].inventory() if id in members else ():
                    mine = (stored.kind, stored.of, stored.step) == (EXPERTS, id, step)
                    if mine and keeper not in stored.pushed and keeper not in stored.failed:
                        return False
        return True

    def save(self, directory: str) -> list[str]:
        """Let all write their part of a checkpoint; the files' names."""
        self.finish()
        epoch = self.epoch
        found = self._on_all("save", lambda host: host.save(directory, epoch))
        return [name for names in found for name in names]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _shared(self) -> bool:
        """Whether experts may have several holders."""
        shape = None if self.elastic is None else self.elastic.shape
        return shape is not None and (shape.replicas > 1 or shape.redundant > 0)

    def _on_all(self, what: str, call: Callable[[HostControl], _T]) -> list[_T]:
        """Call every host at once; the results in the order of the hosts."""
        calls = [(info, self._submit(call, host)) for info, host in self._members()]
        errors = [(info.id, error) for info, one in calls if (error := one.exception()) is not None]
        if errors:
            raise failed_on(what, errors) from errors[0][1]
        return [one.result() for _, one in calls]

    def _members(self) -> list[tuple[HostInfo, HostControl]]:
        """The hosts that hold experts."""
        if self.elastic is None or self.elastic.versions.current is None:
            return []
        hosts = self.elastic.hosts()
        return [hosts[id] for id in self.elastic.versions.current.placement.sites if id in hosts]

    def _submit(self, call: Callable[..., _T], *arguments: object) -> Future[_T]:
        try:
            return self._pool.submit(call, *arguments)
        except RuntimeError as error:
            raise ResourceError("the coordinator has been closed") from error


def _at(epoch: int, host: HostControl, call: Callable[[int, int | None], _T], step: int) -> _T:
    """Command a host in an epoch, which it is told again to go on with if it does not know."""
    try:
        return call(step, epoch)
    except ProtocolError:
        host.retain(epoch)  # what was lost may have been this; fails where the epoch is not held
        return call(step, epoch)


__all__ = ["StepHosts"]
