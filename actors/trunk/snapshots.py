"""A worker's trunk kept in memory, and left with expert hosts, so that a run can go back to it.

Every worker keeps its own. Where all have the same, one of them leaves a copy with two hosts for those that
begin in a new process; where each has a share, each leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from actors.messages.transfer_orders import Blob, Stored
from actors.messages.trunk_parts import complete
from actors.trunk.parameters import TrunkParameters
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError

T = TypeVar("T")

_KEPT = 2
_KEEPERS = 2


class Keeper(Protocol):
    """A host's memory, as far as a trunk needs it; `actors.rpc.host_client.HostClient`."""

    def put(self, blob: Blob) -> None: ...

    def get(self, name: str, step: int) -> Blob: ...

    def inventory(self) -> Sequence[Stored]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Copy:
    step: int
    tensors: dict[str, Tensor]


class TrunkSnapshots:
    """The newest states of one worker's trunk.

    Args:
        trunk: its parameters.
        reach: opens a host's memory.
        rank: of this worker; which hosts it leaves copies with follows from it.
    """

    def __init__(self, trunk: TrunkParameters, reach: Callable[[HostInfo], Keeper], *, rank: int = 0) -> None:
        self._trunk, self._rank = trunk, rank
        self._reach = reach
        leaves = trunk.part is not None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trunk-snapshots") if leaves else None
        self._leaving: Future[None] | None = None
        self._copies: list[_Copy] = []
        self._fetched: int | None = None  # step of what was last taken from hosts

    @torch.no_grad()
    def keep(self, step: int, hosts: Sequence[HostInfo]) -> None:
        """Keep the state after so many steps; whoever leaves copies does so meanwhile the run goes on.

        Args:
            hosts: of which two, on different nodes if there are some, get a copy.
        """
        if self._leaving is not None:
            self._leaving.exception()  # what it reads is about to be used again
        self._copies = [copy for copy in self._copies if copy.step < step]
        old = self._copies.pop(0) if len(self._copies) >= _KEPT else None
        tensors = {} if old is None else old.tensors
        for name, live in self._trunk.state().items():
            if name in tensors:
                tensors[name].copy_(live)
            else:
                tensors[name] = live.detach().to("cpu", copy=True)
        self._copies.append(_Copy(step, tensors))
        if self._pool is not None and hosts:
            keepers = _apart(hosts, self._rank)
            leave = self._leave_where_missing if step == self._fetched else self._leave
            self._leaving = self._pool.submit(leave, self._copies[-1], keepers)

    def restore(self, step: int, hosts: Sequence[HostInfo]) -> None:
        """Go back to the state after so many steps: the own one, or what hosts keep.

        Raises:
            ChannelError: nobody has it any more.
        """
        mine = next((copy.tensors for copy in self._copies if copy.step == step), None)
        if mine is not None:
            self._trunk.take(None, mine)
        else:
            self._fetch(step, hosts)
            self._fetched = step
        self._trunk.taken(step)

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, step: int, hosts: Sequence[HostInfo]) -> None:
        """Take what hosts have, one part after the other, each from the first host that gives it."""
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
        """What a host answers; None, and one error more, where it does not."""
        keeper = self._reach(host)
        try:
            return what(keeper)
        except RaymoeError as error:
            errors.append(str(error))
            return None
        finally:
            keeper.close()

    def _leave_where_missing(self, copy: _Copy, hosts: Sequence[HostInfo]) -> None:
        """What hosts have of this state others may be fetching, who find nothing while it is replaced."""
        named = (self._trunk.part, copy.step)
        kept = [self._ask(host, lambda keeper: keeper.inventory(), []) or () for host in hosts]
        having = [any((one.kind, one.step) == named for one in stored) for stored in kept]
        self._leave(copy, [host for host, has in zip(hosts, having, strict=True) if not has])

    def _leave(self, copy: _Copy, hosts: Sequence[HostInfo]) -> None:
        assert self._trunk.part is not None
        blob = Blob(name=self._trunk.part, step=copy.step, tensors=copy.tensors)
        for host in hosts:
            self._ask(host, lambda keeper: keeper.put(blob), [])  # one is gone, or full: the other has it


def _apart(hosts: Sequence[HostInfo], rank: int) -> list[HostInfo]:
    """A host, another one for each worker, and one on another node if there is one."""
    at = rank % len(hosts)
    first = hosts[at]
    others = sorted([*hosts[at + 1 :], *hosts[:at]], key=lambda host: host.node == first.node)
    return [first, *others[: _KEEPERS - 1]]


__all__ = ["Keeper", "TrunkSnapshots"]
