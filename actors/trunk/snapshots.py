"""Snapshots of a worker's trunk in memory, and stored with expert hosts, for a run to go back to.

Every worker keeps its own snapshots. Workers that start in a new process fetch them from two hosts: one
worker stores a replicated trunk there, and every worker stores its part of a sharded one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

from actors.messages.transfer_orders import Blob, StoredCopy
from actors.messages.trunk_parts import complete
from actors.trunk.parameters import TrunkParameters
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError

T = TypeVar("T")
_log = logging.getLogger(__name__)

_KEPT: Final = 2
"""Snapshots that a worker keeps."""
_KEEPERS: Final = 2
"""Hosts that store a copy."""


class Keeper(Protocol):
    """The snapshot store of a host; implemented by `actors.rpc.host_client.HostClient`."""

    def put(self, blob: Blob) -> None: ...

    def get(self, name: str, step: int) -> Blob: ...

    def inventory(self) -> Sequence[StoredCopy]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _TrunkCopy:
    step: int
    tensors: dict[str, Tensor]


class TrunkSnapshots:
    """The newest snapshots of one worker's trunk.

    Args:
        trunk: Parameters of the trunk.
        reach: Connects to a host's snapshot store.
        rank: Rank of this worker; chooses the hosts that store its copies.
    """

    def __init__(self, trunk: TrunkParameters, reach: Callable[[HostInfo], Keeper], *, rank: int = 0) -> None:
        self._trunk, self._rank = trunk, rank
        self._reach = reach
        stores = trunk.part is not None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trunk-snapshots") if stores else None
        self._storing: Future[None] | None = None
        self._copies: list[_TrunkCopy] = []
        self._fetched: int | None = None  # step of the snapshot that was last fetched from hosts

    @torch.no_grad()
    def keep(self, step: int, hosts: Sequence[HostInfo]) -> None:
        """Keep a snapshot of step `step`; copies are sent to hosts while the run continues.

        Args:
            hosts: Two of them, on different nodes if possible, get a copy.

        Raises:
            Exception: The copy before this one could not be sent for a reason other than a host that is gone
                or full.
        """
        storing, self._storing = self._storing, None
        if storing is not None:
            storing.result()  # the memory that it reads is about to be written
        self._copies = [copy for copy in self._copies if copy.step < step]
        old = self._copies.pop(0) if len(self._copies) >= _KEPT else None
        tensors = {} if old is None else old.tensors
        for name, live in self._trunk.state().items():
            if name in tensors:
                tensors[name].copy_(live)
            else:
                tensors[name] = live.detach().to("cpu", copy=True)
        self._copies.append(_TrunkCopy(step, tensors))
        if self._pool is not None and hosts:
            keepers = _apart(hosts, self._rank)
            store = self._store_where_missing if step == self._fetched else self._store
            self._storing = self._pool.submit(store, self._copies[-1], keepers)

    def restore(self, step: int, hosts: Sequence[HostInfo]) -> None:
        """Go back to the snapshot of step `step`: this worker's own, or the copies of hosts.

        Raises:
            ChannelError: No host has it.
        """
        mine = next((copy.tensors for copy in self._copies if copy.step == step), None)
        if mine is not None:
            self._trunk.take(None, mine)
        else:
            self._fetch(step, hosts)
            self._fetched = step
        self._trunk.taken(step)

    def close(self) -> None:
        """End the thread; an unexpected error of the last copy is logged, since the run is over."""
        if self._pool is None:
            return
        self._pool.shutdown(wait=True, cancel_futures=True)
        storing = self._storing
        if storing is not None and not storing.cancelled() and (error := storing.exception()) is not None:
            _log.error("the last snapshot of the trunk was not stored with hosts", exc_info=error)

    def _fetch(self, step: int, hosts: Sequence[HostInfo]) -> None:
        """Load the copies of hosts, one part after the other, each from the first host that returns it."""
        errors: list[str] = []
        having: dict[str, list[HostInfo]] = {}
        for host in hosts:
            for stored in self._ask(host, lambda keeper: keeper.inventory(), errors) or ():
                if stored.step == step:
                    having.setdefault(stored.kind, []).append(host)
        parts = complete(having)
        taken = [self._take(part, step, having[part], errors) for part in parts]
        if not parts or not all(taken):
            why = "; ".join(errors) or ("none keeps it" if hosts else "none was asked")
            raise ChannelError(f"no host has the trunk of step {step}: {why}")

    def _take(self, part: str, step: int, hosts: Sequence[HostInfo], errors: list[str]) -> bool:
        for host in hosts:
            blob = self._ask(host, lambda keeper: keeper.get(part, step), errors)
            if blob is not None:
                self._trunk.take(part, blob.tensors)
                return True
        return False

    def _ask(self, host: HostInfo, what: Callable[[Keeper], T], errors: list[str]) -> T | None:
        """The answer of a host; None, with the error appended to `errors`, if there is none."""
        try:
            keeper = self._reach(host)
            try:
                return what(keeper)
            finally:
                keeper.close()
        except RaymoeError as error:
            errors.append(str(error))
            return None

    def _store_where_missing(self, copy: _TrunkCopy, hosts: Sequence[HostInfo]) -> None:
        """Store with hosts that lack this snapshot only: it cannot be fetched while it is replaced."""
        named = (self._trunk.part, copy.step)
        kept = [self._ask(host, lambda keeper: keeper.inventory(), []) or () for host in hosts]
        having = [any((one.kind, one.step) == named for one in stored) for stored in kept]
        self._store(copy, [host for host, has in zip(hosts, having, strict=True) if not has])

    def _store(self, copy: _TrunkCopy, hosts: Sequence[HostInfo]) -> None:
        assert self._trunk.part is not None
        blob = Blob(name=self._trunk.part, step=copy.step, tensors=copy.tensors)
        for host in hosts:
            self._ask(
                host, lambda keeper: keeper.put(blob), []
            )  # a host that is gone or full is left out: the other one has a copy


def _apart(hosts: Sequence[HostInfo], rank: int) -> list[HostInfo]:
    """A host that depends on the worker's rank, and another one, on another node if possible."""
    at = rank % len(hosts)
    first = hosts[at]
    others = sorted([*hosts[at + 1 :], *hosts[:at]], key=lambda host: host.node == first.node)
    return [first, *others[: _KEEPERS - 1]]


__all__ = ["Keeper", "TrunkSnapshots"]
