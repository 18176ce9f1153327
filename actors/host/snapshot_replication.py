"""Snapshots of a training host's state, replicated to buddy hosts in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from actors.host.hosted_versions import HostedVersions
from actors.host.snapshot_store import SnapshotStore
from actors.host.state_copy import StateCopy
from actors.messages.transfer_orders import Peer
from cluster.topology import HostInfo
from errors import ProtocolError


class SnapshotReplication:
    """Takes snapshots of the current version and sends them to buddies, one snapshot at a time.

    Args:
        host: Id of the host, for error messages.
        versions: The experts, by epoch.
        store: Where the copies are kept.
        connect: Opens a connection to a buddy.
        commit_timeout: Seconds that a snapshot waits for the commit of its step.
    """

    def __init__(
        self,
        host: str,
        versions: HostedVersions,
        store: SnapshotStore,
        connect: Callable[[HostInfo], Peer],
        commit_timeout: float,
    ) -> None:
        self._host = host
        self._versions = versions
        self._store = store
        self._connect = connect
        self._commit_timeout = commit_timeout
        self._copying = threading.Lock()
        self._sending = threading.Lock()

    def snapshot(self, step: int, buddies: Sequence[HostInfo], epoch: int | None) -> None:
        """Copy the state of a step aside, and then send the copy to buddies in the background.

        A retry does nothing. Waits for the step's commit if that is under way. Requests are answered
        meanwhile; the next commit waits until the memory has been copied.

        Raises:
            ProtocolError: the host is at another step or epoch.
        """
        versions = self._versions
        version = versions.at(epoch)
        versions.await_commit(version, step, self._commit_timeout)
        with self._copying:
            if self._store.own(step, version.epoch) is not None:
                return
            with versions.commit_lock:
                current = versions.current
                if version is not current:
                    raise ProtocolError(
                        f"expert host {self._host} has gone on to epoch {current.epoch}; ask again"
                    )
                versions.check(version, step)
                copy = self._store.take(step, version.epoch, version.layers)
        self._replicate(copy, buddies)

    def _replicate(self, copy: StateCopy, buddies: Sequence[HostInfo]) -> None:
        copy.pushes = dict.fromkeys((buddy.id for buddy in buddies), None)
        if buddies:
            threading.Thread(
                target=self._send, args=(copy, tuple(buddies)), name=f"push-{copy.step}", daemon=True
            ).start()

    def _send(self, copy: StateCopy, buddies: Sequence[HostInfo]) -> None:
        """Send a copy to each buddy and note the outcomes; a copy that has been dropped meanwhile fails."""
        with self._sending:
            for buddy in buddies:
                outcome = ""
                try:
                    copy.check()
                    peer = self._connect(buddy)
                    try:
                        peer.store(copy.frames())
                    finally:
                        peer.close()
                except Exception as error:  # not raised: recovery reads the inventory of what has arrived
                    outcome = f"{type(error).__name__}: {error}"
                copy.pushes = {**copy.pushes, buddy.id: outcome}


__all__ = ["SnapshotReplication"]
