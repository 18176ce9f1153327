"""One MoE layer's call of inference to the expert hosts, over channels.

Shapes: N tokens, D hidden, K experts per token; n rows and nnz (row, expert) pairs for one host.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import Tensor

from actors.router.device_rows import Outgoing, add_up
from actors.router.reroute import Detour, Lost
from actors.router.routes import Placement
from channels.base import Phase, Request, Ticket
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, RaymoeError, RemoteError, StaleEpoch
from model.dispatch import HostSlice, plan_dispatch

if TYPE_CHECKING:
    from actors.router.lane import Lane

Reply = tuple[Tensor, ...]


class Call:
    """The way of a layer's rows to the hosts and back, for one microbatch; a `Pending`.

    When a host is lost the whole call goes again on another placement: hosts keep nothing of it.

    Args:
        lane: whose call it is.
        idx: [N, K], in the CPU's memory.
        placement: with a host for every expert of idx.
        detour: of the call that this one stands in for.
    """

    phase = Phase.INFER

    def __init__(
        self,
        lane: Lane,
        layer: int,
        idx: Tensor,
        placement: Placement,
        *,
        step: int,
        microbatch: int,
        detour: Detour | None = None,
    ) -> None:
        self._lane = lane
        self._idx = idx
        self.layer, self.step, self.microbatch = layer, step, microbatch
        self.placement = placement
        self._detour = detour
        self._lost: list[Lost] = []
        self._slices: tuple[HostSlice | None, ...] = ()
        self._tickets: dict[int, Ticket] = {}
        self._sent: tuple[Tensor, Tensor] | None = (
            None  # rows and gates, to send again until the reply is there
        )
        self._out: Outgoing | None = None  # as long as they may have to be sent
        self._like: tuple[Tensor, Tensor]  # empty tensors of the rows' and gates' kind

    @property
    def key(self) -> tuple[int, int, int]:
        return (self.step, self.microbatch, self.layer)

    def send(self, rows: Tensor, gates: Tensor) -> None:
        """Submit the rows to hosts of their experts, each to one.

        Args:
            gates: in the CPU's memory.
        """
        self._slices = self._plan(gates)
        self._sent = (rows, gates)
        self._out = Outgoing(rows)
        self._like = (rows.new_empty(0, rows.shape[1]), gates.new_empty(0))
        sent = 0
        for host, part in enumerate(self._slices):
            if part is not None:
                self._submit(host, part)
                sent += part.row.numel()
        counters = self._lane.counters
        counters.tokens += rows.shape[0]
        counters.rows += sent

    def combine(self) -> Tensor:
        """Wait for the hosts' partial sums and add them up: [N, D]."""
        while True:
            try:
                parts = self._collect()
                if not self._lost:
                    break
                self._send_on(self._go_around())
            except StaleEpoch as error:
                self._send_on(self._lane.router.replan(error, self.placement, step=None))
        self._sent = self._out = None
        self._lane.done(self)
        return self._sum([part[0] if part else None for part in parts])

    def abandon(self) -> None:
        """Read the replies that are out."""
        tickets, self._tickets = self._tickets, {}
        for host, ticket in tickets.items():
            with suppress(RaymoeError):
                self._lane.wait(self.placement.hosts[host], ticket, self._lane.router.timeout)

    def _plan(self, gates: Tensor) -> tuple[HostSlice | None, ...]:
        held = self.placement
        return plan_dispatch(
            self._idx, gates, held.host_of(self.layer), len(held.hosts), self._lane.next_shift()
        )

    def _request(self, host: HostInfo, part: HostSlice) -> Request:
        """What goes to one host."""
        return Request(
            id=self._lane.request_id(self, self.phase, self.placement.epoch),
            tensors=(self._rows(host, part), part.row_ptr, part.expert, part.gate),
        )

    def _rows(self, host: HostInfo, part: HostSlice) -> Tensor:
        assert self._out is not None
        return self._out.part(part, there=self._lane.takes(host, self._like[0].device))

    def _submit(self, host: int, part: HostSlice) -> None:
        try:
            at = self.placement.hosts[host]
            self._tickets[host] = self._lane.submit(at, self._request(at, part))
        except RemoteError:
            raise
        except ChannelError as error:
            self._lost.append(Lost(self.placement.hosts[host], error))

    def _wait(self, host: int, ticket: Ticket) -> Reply | None:
        """The reply of a host, or None where it is lost."""
        limit, hedging = self._lane.limit(self.placement, self.layer, self._detour)
        try:
            return self._lane.wait(self.placement.hosts[host], ticket, limit)
        except RemoteError:
            raise
        except ChannelError as error:
            slow = hedging and isinstance(error, ChannelTimeout)
            self._lost.append(Lost(self.placement.hosts[host], error, slow))
            return None

    def _go_around(self) -> Placement:
        self._detour = self._detour or Detour(self._lane.router, self.layer, self._idx)
        lost, self._lost = self._lost, []
        return self._detour.around(lost, self.placement)

    def _send_on(self, placement: Placement) -> None:
        """The whole call again, on another placement."""
        assert self._sent is not None
        self._lost.clear()
        if not placement.covers(self.layer, self._idx):  # a newer one, of which this call has not been told
            self._detour = self._detour or Detour(self._lane.router, self.layer, self._idx)
            placement = self._detour.begin()
        self.placement = placement
        self.send(*self._sent)

    def _collect(self) -> list[Reply | None]:
        """The replies of all hosts, in their order. Every one is waited for, then the first error raised."""
        replies: list[Reply | None] = [None] * len(self._slices)
        errors: list[RaymoeError] = []
        tickets, self._tickets = self._tickets, {}
        for host, ticket in tickets.items():
            try:
                replies[host] = self._wait(host, ticket)
            except RaymoeError as error:
                errors.append(error)
        if errors:
            # A stale epoch can be healed, so any other error goes first.
            raise min(errors, key=lambda error: isinstance(error, StaleEpoch))
        return replies

    def _sum(self, parts: Sequence[Tensor | None]) -> Tensor:
        """[N, D]: the hosts' rows added up."""
        return add_up(self._slices, parts, self._idx.shape[0], self._like[0])


__all__ = ["Call", "Reply"]
