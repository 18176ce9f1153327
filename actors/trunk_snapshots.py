"""A worker's trunk kept in memory, and left with expert hosts, so that a run can go back to it.

Every worker keeps its own; they are all the same, so one of them leaves a copy with two hosts for those that
begin in a new process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from actors.common_snapshot import TRUNK
from actors.moves import Blob
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError
from model.optimizer import AdamW
from model.transformer import Transformer

_KEPT = 2
_KEEPERS = 2


class Keeper(Protocol):
    """A host's memory, as far as a trunk needs it; `actors.clients.HostClient`."""

    def put(self, blob: Blob) -> None: ...

    def get(self, name: str, step: int) -> Blob: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Copy:
    step: int
    tensors: dict[str, Tensor]


class TrunkSnapshots:
    """The newest states of one worker's trunk.

    Args:
        model, optimizer: the trunk.
        reach: opens a host's memory.
        leaves: whether this worker is the one that leaves copies with hosts.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: AdamW,
        reach: Callable[[HostInfo], Keeper],
        *,
        leaves: bool,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._reach = reach
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trunk-snapshots") if leaves else None
        self._leaving: Future[None] | None = None
        self._copies: list[_Copy] = []

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
        for name, live in self._live().items():
            if name in tensors:
                tensors[name].copy_(live)
            else:
                tensors[name] = live.detach().to("cpu", copy=True)
        self._copies.append(_Copy(step, tensors))
        if self._pool is not None and hosts:
            self._leaving = self._pool.submit(self._leave, self._copies[-1], _apart(hosts))

    def restore(self, step: int, hosts: Sequence[HostInfo]) -> None:
        """Go back to the state after so many steps: the own one, or what a host keeps.

        Raises:
            ChannelError: nobody has it any more.
        """
        mine = next((copy.tensors for copy in self._copies if copy.step == step), None)
        self._take(step, mine if mine is not None else self._fetch(step, hosts))

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @torch.no_grad()
    def _take(self, step: int, tensors: dict[str, Tensor]) -> None:
        for name, live in self._live().items():
            if name != "bias":
                live.copy_(tensors[name])
        self._model.set_bias(tensors["bias"])
        self._optimizer.round_values()
        self._optimizer.step_count = step
        self._optimizer.zero_grad()

    def _fetch(self, step: int, hosts: Sequence[HostInfo]) -> dict[str, Tensor]:
        errors = []
        for host in hosts:
            keeper = self._reach(host)
            try:
                return dict(keeper.get(TRUNK, step).tensors)
            except RaymoeError as error:
                errors.append(str(error))
            finally:
                keeper.close()
        raise ChannelError(f"no host has the trunk of step {step}: {'; '.join(errors) or 'none was asked'}")

    def _leave(self, copy: _Copy, hosts: Sequence[HostInfo]) -> None:
        blob = Blob(name=TRUNK, step=copy.step, tensors=copy.tensors)
        for host in hosts:
            keeper = self._reach(host)
            try:
                keeper.put(blob)
            except RaymoeError:  # the host is gone, or full: the other has it
                continue
            finally:
                keeper.close()

    def _live(self) -> dict[str, Tensor]:
        buffers = {f"group-{at}": buffer for at, buffer in enumerate(self._optimizer.state_buffers())}
        return {**buffers, "bias": self._model.bias()}


def _apart(hosts: Sequence[HostInfo]) -> list[HostInfo]:
    """The first host, and one on another node if there is one."""
    first = hosts[0]
    others = sorted(hosts[1:], key=lambda host: host.node == first.node)
    return [first, *others[: _KEEPERS - 1]]


__all__ = ["Keeper", "TrunkSnapshots"]
