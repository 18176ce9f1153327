"""A lane's calls of few rows through mailboxes, for inference on hosts of the same machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from channels.mailbox import MAX_ROWS, Mailbox
from channels.shm import ShmChannel
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, RaymoeError

if TYPE_CHECKING:
    from actors.lane import Lane
    from actors.router import Placement

Array = npt.NDArray[Any]


class MailCall:
    """One MoE layer's way to the hosts and back; a `Pending` and an `ArrayPending`.

    Args:
        lane: whose call it is.
        boxes: of the placement's hosts, in their order.
        call: step and layer.
        rows, idx, gates: [N, D], [N, K] and [N, K]; N fits the boxes.

    Raises:
        ChannelError: a host cannot be woken, naming it.
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
    ) -> None:
        self._lane, self._placement, self._boxes = lane, placement, boxes
        self._layer = call[1]
        self._asked = (rows, idx, gates)
        self._out: list[int] = []  # hosts whose replies are out
        self.key = (call[0], -1, call[1])
        host_of = placement.host_of(self._layer).numpy()
        counters = lane.counters
        counters.tokens += rows.shape[0]
        for host, box in enumerate(boxes):
            try:
                sent = box.post(*self._asked, host_of, host, (placement.epoch, *call))
            except RaymoeError as error:
                lost = lane.lost(placement.hosts[host], error)
                self.abandon()  # nobody has this call yet who could
                raise lost from error
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
        sums = np.zeros_like(out)  # apart: where one host refuses, none of them counts
        answered = self._collect(sums)
        self._lane.done(self)
        if not answered:
            sums = self._lane.send(self._layer, *map(torch.from_numpy, self._asked)).combine().numpy()
        out += sums

    def abandon(self) -> None:
        """Read the replies that are out."""
        with suppress(RaymoeError):
            self._collect(np.zeros_like(self._asked[0]))

    def _collect(self, total: Array) -> bool:
        """Whether all hosts have answered. Every one is waited for, then the first error raised."""
        answered = True
        errors: list[RaymoeError] = []
        waiting, self._out = self._out, []
        for host in waiting:
            try:
                answered &= self._boxes[host].collect(total, self._lane.timeout)
            except (ChannelError, ChannelTimeout) as error:
                errors.append(self._lane.lost(self._placement.hosts[host], error))
        if errors:
            raise errors[0]
        return answered


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

    def forget(self, host: HostInfo) -> None:
        """The channel to a host is closed."""
        self._of.pop(host.id, None)
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
