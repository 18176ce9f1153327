"""A lane's calls of few rows through mailboxes: inference on hosts of the same machine.

Shapes: N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.router.call_context import CallContext, CallKey
from actors.router.connections import Connections
from actors.router.host_map import HostMap
from actors.router.inference_call import InferenceCall
from actors.router.reroute import Lost, Reroute
from channels.base import MAX_MAILBOX_ROWS, Channel, Mailbox
from errors import ChannelError, ChannelTimeout, RaymoeError

Array = npt.NDArray[Any]


class MailboxCall:
    """One MoE layer's rows in the hosts' mailboxes; a `Pending` and an `ArrayPending`.

    Args:
        mailboxes: Mailboxes of the map's hosts, in their order.
        rows, idx, gates: [N, D], [N, K] and [N, K]; N fits the mailboxes.
        reroute: The search that led to this map; None if it took none.

    Raises:
        ChannelError: A host cannot be woken, and no other can take its place; names the host.
    """

    def __init__(
        self,
        context: CallContext,
        host_map: HostMap,
        mailboxes: Sequence[Mailbox],
        layer: int,
        rows: Array,
        idx: Array,
        gates: Array,
        reroute: Reroute | None,
    ) -> None:
        self._context, self._host_map, self._mailboxes = context, host_map, mailboxes
        self._layer = layer
        self._asked = (rows, idx, gates)
        self._due: list[int] = []  # hosts that have yet to reply
        self._reroute = reroute
        self._over_channels: InferenceCall | None = None
        step = context.step
        self.key: CallKey = (step, -1, layer)
        context.open_calls.add(self)
        host_of, shift = host_map.array(layer), context.shifts.next()
        call, counters = (host_map.epoch, step, layer), context.connections.counters
        counters.tokens += rows.shape[0]
        for host, mailbox in enumerate(mailboxes):
            try:
                sent = mailbox.post(rows, idx, gates, host_of, host, call, shift)
            except RaymoeError as error:
                lost = Lost(host_map.hosts[host], context.connections.failed(host_map.hosts[host], error))
                self.abandon()
                self._over_channels = self._send_around([lost])
                return
            if sent:
                self._due.append(host)
                counters.rows += sent
                counters.bytes += 2 * sent * rows.shape[1] * rows.itemsize

    def combine(self) -> Tensor:
        """Wait for the hosts' sums and add them up, in the order of the hosts: [N, D]."""
        total = np.zeros_like(self._asked[0])
        self.add_to(total)
        return torch.from_numpy(total)

    def add_to(self, out: Array) -> None:
        """Wait for the hosts' sums and add them to `out` [N, D], in the order of the hosts."""
        if self._over_channels is None:
            sums = np.zeros_like(out)  # apart: where one host refuses, no host's sum counts
            answered, lost = self._collect(sums)
            if lost:
                self._over_channels = self._send_around(lost)
            elif not answered:
                self._over_channels = self._send(self._host_map)
        self._context.open_calls.over(self)
        if self._over_channels is not None:
            sums = self._over_channels.combine().numpy()
        out += sums

    def abandon(self) -> None:
        self._collect(np.zeros_like(self._asked[0]))

    def _collect(self, total: Array) -> tuple[bool, list[Lost]]:
        """Wait for every host's sum; whether all hosts but the lost ones have answered, and the lost ones."""
        answered = True
        lost: list[Lost] = []
        waiting, self._due = self._due, []
        routing, reroute = self._context.routing, self._reroute
        for host in waiting:
            hedged = 0 if reroute is None else reroute.hedged
            limit, hedging = routing.reply_limit(self._layer, hedged)
            try:
                answered &= self._mailboxes[host].collect(total, limit)
            except ChannelError as error:
                info = self._host_map.hosts[host]
                slow = hedging and isinstance(error, ChannelTimeout)
                lost.append(Lost(info, self._context.connections.failed(info, error), slow))
        return answered, lost

    def _send_around(self, lost: Sequence[Lost]) -> InferenceCall:
        """Send the whole call over channels, to other hosts."""
        self._reroute = self._reroute or Reroute(self._context.routing, self._layer, self._asked[1])
        return self._send(self._reroute.around(lost, self._host_map))

    def _send(self, host_map: HostMap) -> InferenceCall:
        rows, idx, gates = map(torch.from_numpy, self._asked)
        return InferenceCall(self._context, self._layer, rows, idx, gates, host_map, self._reroute)


class LaneMailboxes:
    """The mailboxes of one lane: opened when they are first wanted, used once all hosts read them."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._of: dict[str, tuple[Channel, Mailbox]] = {}
        self._shape: tuple[int, int, np.dtype[Any]] | None = None
        self._ready: tuple[HostMap, list[Mailbox]] | None = None
        connections.on_disconnect(self._forget)

    def for_call(self, host_map: HostMap, rows: Array, idx: Array) -> list[Mailbox] | None:
        """The mailboxes of a map's hosts, or None where one has none that fits."""
        if self._ready is not None and self._ready[0] is host_map and rows.shape[0] <= MAX_MAILBOX_ROWS:
            return self._ready[1] if self._shape == (rows.shape[1], idx.shape[1], rows.dtype) else None
        return self._open(host_map, rows, idx)

    def _forget(self, host_id: str) -> None:
        """Drop the mailbox of a host whose channel is closed."""
        self._of.pop(host_id, None)
        self._ready = None

    def _open(self, host_map: HostMap, rows: Array, idx: Array) -> list[Mailbox] | None:
        shape = (rows.shape[1], idx.shape[1], rows.dtype)
        if rows.shape[0] > MAX_MAILBOX_ROWS or self._shape not in (None, shape):
            return None
        self._shape = shape
        found = []
        for host in host_map.hosts:
            try:
                channel = self._connections.channel(host)
                known = self._of.get(host.id)
                if known is None or known[0] is not channel:
                    mailbox = channel.open_mailbox(rows.shape[1], MAX_MAILBOX_ROWS * idx.shape[1], rows.dtype)
                    if mailbox is None:
                        return None
                    known = self._of[host.id] = (channel, mailbox)
            except RaymoeError:  # if the call needs this host, its request over the channel raises the error
                return None
            found.append(known[1])
        if not all(mailbox.ready for mailbox in found):
            return None
        self._ready = (host_map, found)
        return found


__all__ = ["LaneMailboxes", "MailboxCall"]
