"""A lane's calls of few rows through mailboxes, for inference on hosts of the same machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.router.reroute import Detour, Lost
from actors.router.routes import Placement
from channels.shm.channel import ShmChannel
from channels.shm.mailbox import MAX_ROWS, Mailbox
from errors import ChannelError, ChannelTimeout, RaymoeError

if TYPE_CHECKING:
    from actors.router.inference_call import Call
    from actors.router.lane import Lane

Array = npt.NDArray[Any]


class MailCall:
    """One MoE layer's way to the hosts and back; a `Pending` and an `ArrayPending`.

    Args:
        lane: whose call it is.
        boxes: of the placement's hosts, in their order.
        call: step and layer.
        rows, idx, gates: [N, D], [N, K] and [N, K]; N fits the boxes.
        detour: the search that led to this placement, if it took one.

    Raises:
        ChannelError: a host cannot be woken, naming it, nor others in its place.
    """

    def __init__(
        self,
        lane: Lane,
        placement: Placement,
        boxes: Sequence[Mailbox],
        call: tuple[int, int],
        rows: Array,
        idx: Array,
        gates: Array,
        detour: Detour | None,
    ) -> None:
        self._lane, self._placement, self._boxes = lane, placement, boxes
        self._layer = call[1]
        self._asked = (rows, idx, gates)
        self._out: list[int] = []  # hosts whose replies are out
        self._detour = detour
        self._again: Call | None = None
        self.key = (call[0], -1, call[1])
        host_of, shift = placement.array(self._layer), lane.next_shift()
        counters = lane.counters
        counters.tokens += rows.shape[0]
        for host, box in enumerate(boxes):
            try:
                sent = box.post(rows, idx, gates, host_of, host, (placement.epoch, *call), shift)
            except RaymoeError as error:
                lost = Lost(placement.hosts[host], lane.lost(placement.hosts[host], error))
                self.abandon()  # nobody has this call yet who could
                self._again = self._elsewhere([lost])
                return
            if sent:
                self._out.append(host)
                counters.rows += sent
                counters.bytes += 2 * sent * rows.shape[1] * rows.itemsize

    def combine(self) -> Tensor:
        """Wait for the hosts' sums and add them up, in the order of the hosts: [N, D]."""
        total = np.zeros_like(self._asked[0])
        self.add_to(total)
        return torch.from_numpy(total)

    def add_to(self, out: Array) -> None:
        """Wait for the hosts' sums and add them to `out` [N, D], in the order of the hosts."""
        if self._again is None:
            sums = np.zeros_like(out)  # apart: where one host refuses, none of them counts
            answered, lost = self._collect(sums)
            if lost:
                self._again = self._elsewhere(lost)
            elif not answered:
                self._again = self._over_channels(self._placement)
        self._lane.done(self)
        if self._again is not None:
            sums = self._again.combine().numpy()
        out += sums

    def abandon(self) -> None:
        """Read the replies that are out."""
        self._collect(np.zeros_like(self._asked[0]))

    def _collect(self, total: Array) -> tuple[bool, list[Lost]]:
        """Whether all hosts but the lost ones have answered, and those. Every one is waited for."""
        answered = True
        lost: list[Lost] = []
        waiting, self._out = self._out, []
        for host in waiting:
            limit, hedging = self._lane.limit(self._placement, self._layer, self._detour)
            try:
                answered &= self._boxes[host].collect(total, limit)
            except ChannelError as error:
                info = self._placement.hosts[host]
                slow = hedging and isinstance(error, ChannelTimeout)
                lost.append(Lost(info, self._lane.lost(info, error), slow))
        return answered, lost

    def _elsewhere(self, lost: Sequence[Lost]) -> Call:
        """The whole call again, on another placement."""
        self._detour = self._detour or Detour(self._lane.router, self._layer, self._asked[1])
        return self._over_channels(self._detour.around(lost, self._placement))

    def _over_channels(self, placement: Placement) -> Call:
        rows, idx, gates = map(torch.from_numpy, self._asked)
        return self._lane.send(self._layer, rows, idx, gates, placement, self._detour)


class Boxes:
    """The mailboxes of one lane: opened when they are first wanted, used once all hosts look into them."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._of: dict[str, tuple[ShmChannel, Mailbox]] = {}
        self._kind: tuple[int, int, np.dtype[Any]] | None = None
        self._ready: tuple[Placement, list[Mailbox]] | None = None

    def for_call(self, placement: Placement, rows: Array, idx: Array) -> list[Mailbox] | None:
        """The boxes of a placement's hosts, or None where one has none that fits."""
        if self._ready is not None and self._ready[0] is placement and rows.shape[0] <= MAX_ROWS:
            return self._ready[1] if self._kind == (rows.shape[1], idx.shape[1], rows.dtype) else None
        return self._open(placement, rows, idx)

    def forget(self, host_id: str) -> None:
        """The channel to a host is closed."""
        self._of.pop(host_id, None)
        self._ready = None

    def clear(self) -> None:
        """All channels are."""
        self._of.clear()
        self._ready = None

    def _open(self, placement: Placement, rows: Array, idx: Array) -> list[Mailbox] | None:
        kind = (rows.shape[1], idx.shape[1], rows.dtype)
        if rows.shape[0] > MAX_ROWS or self._kind not in (None, kind):
            return None
        self._kind = kind
        found = []
        for host in placement.hosts:
            try:
                channel = self._lane.channel(host)
                if not isinstance(channel, ShmChannel):
                    return None
                known = self._of.get(host.id)
                if known is None or known[0] is not channel:
                    mailbox = channel.open_mailbox(rows.shape[1], MAX_ROWS * idx.shape[1], rows.dtype)
                    known = self._of[host.id] = (channel, mailbox)
            except RaymoeError:  # the call may want nothing of this host; if it does, its channel will tell
                return None
            found.append(known[1])
        if not all(mailbox.ready for mailbox in found):
            return None
        self._ready = (placement, found)
        return found


__all__ = ["Boxes", "MailCall"]
