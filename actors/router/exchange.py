"""The exchange of one MoE layer's rows with the expert hosts: dispatch, wait, combine.

Inference and training make the same exchange. What happens when a request or a reply is lost is a policy of
the call: `actors.router.reroute` for inference, `actors.router.training_call` for training.

Shapes: N tokens, D hidden, K experts per token; n rows and nnz (row, expert) pairs for one host.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from torch import Tensor

from actors.router.call_context import CallContext
from actors.router.host_map import HostMap
from channels.base import Phase, Request, RequestId, Ticket
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError, RemoteError, StaleEpoch
from model.dispatch import HostSlice, OutgoingRows, combine_rows, plan_dispatch

Reply = tuple[Tensor, ...]


class LossPolicy(Protocol):
    """What a call does when it loses a request or a reply."""

    def limit(self) -> float | None:
        """Seconds to wait for the next reply; None waits without a limit."""
        ...

    def lost(self, host: HostInfo, error: ChannelError) -> bool:
        """Decide on a loss: whether the same request goes to the same host again.

        Raises:
            ChannelError: The call fails.
        """
        ...


class Exchange:
    """One layer's requests to the hosts, and their replies.

    Args:
        idx: [N, K], in the CPU's memory.
        policy: Decides on losses.

    Attributes:
        host_map: Where the rows have been sent; with a host for every expert of idx.
        slices: The rows of each host; None for a host without rows.
    """

    host_map: HostMap
    _out: OutgoingRows | None  # as long as rows may have to be sent
    _like: Tensor  # [0, D], of the rows' type and device
    _id: RequestId

    def __init__(self, context: CallContext, layer: int, idx: Tensor, policy: LossPolicy) -> None:
        self._context, self._layer, self._idx, self._policy = context, layer, idx, policy
        self.slices: tuple[HostSlice | None, ...] = ()
        self._tickets: dict[int, Ticket] = {}

    def send(self, host_map: HostMap, phase: Phase, rows: Tensor, gates: Tensor, shift: int) -> None:
        """Submit rows [N, D] with gates [N, K] to hosts of their experts, each pair to one.

        Args:
            phase: INFER or FORWARD.
            gates: Gates [N, K], in CPU memory.
            shift: Chooses among replicas, see `plan_dispatch`.
        """
        self.slices = plan_dispatch(
            self._idx, gates, host_map.host_of(self._layer), len(host_map.hosts), shift
        )
        self.host_map = host_map
        self._out, self._like = OutgoingRows(rows), rows.new_empty(0, rows.shape[1])
        self._submit_all(phase)
        counters = self._context.connections.counters
        counters.tokens += rows.shape[0]
        counters.rows += sum([part.row.numel() for part in self.slices if part is not None])

    def send_gradients(self, d_out: Tensor) -> None:
        """Submit the gradient [N, D] of the sum to every host that had rows."""
        self._out = OutgoingRows(d_out.contiguous())
        self._submit_all(Phase.BACKWARD)

    def collect(self) -> list[Reply | None]:
        """The replies of all hosts, in their order; None for a host without rows, or one that is lost.

        Raises:
            RaymoeError: The first error, once every reply has been waited for; `StaleEpoch` only if there is
                no other error, since a newer table resolves it.
        """
        replies: list[Reply | None] = [None] * len(self.slices)
        errors: list[RaymoeError] = []
        tickets, self._tickets = self._tickets, {}
        for host, ticket in tickets.items():
            try:
                replies[host] = self._wait(host, ticket)
            except RaymoeError as error:
                errors.append(error)
        if errors:
            raise min(errors, key=lambda error: isinstance(error, StaleEpoch))
        return replies

    def combine(self, replies: Sequence[Reply | None]) -> Tensor:
        """The hosts' rows added up, [N, D]; nothing is sent again after this."""
        self._out = None
        parts = [reply[0] if reply else None for reply in replies]
        return combine_rows(self.slices, parts, self._idx.shape[0], self._like)

    def drain(self) -> None:
        """Read the replies that are due."""
        connections, timeout = self._context.connections, self._context.routing.timeout
        tickets, self._tickets = self._tickets, {}
        for host, ticket in tickets.items():
            with suppress(RaymoeError):
                connections.wait(self.host_map.hosts[host], ticket, timeout, self._context.step)

    def release(self) -> None:
        """Let the hosts drop what they keep of a FORWARD; a host that is gone has dropped it."""
        connections = self._context.connections
        for host, part in enumerate(self.slices):
            # Not over a new channel: connecting to a host that is gone would take its time, and one that
            # is there drops everything at the end of the step.
            if part is not None and connections.reaches(self.host_map.hosts[host]):
                id = self._context.request_id(self._layer, Phase.RELEASE, self.host_map.epoch)
                with suppress(RaymoeError):
                    self._tickets[host] = connections.submit(self.host_map.hosts[host], Request(id))
        self.drain()

    def _submit_all(self, phase: Phase) -> None:
        self._id = self._context.request_id(self._layer, phase, self.host_map.epoch)
        for host, part in enumerate(self.slices):
            if part is not None:
                self._submit(host, part)

    def _submit(self, host: int, part: HostSlice) -> None:
        at, connections = self.host_map.hosts[host], self._context.connections
        assert self._out is not None
        while True:
            try:
                rows = self._out.part(part, there=connections.takes(at, self._like.device))
                backward = self._id.phase is Phase.BACKWARD
                tensors = (rows,) if backward else (rows, part.row_ptr, part.expert, part.gate)
                self._tickets[host] = connections.submit(at, Request(self._id, tensors))
                return
            except RemoteError:
                raise
            except ChannelError as error:
                if not self._policy.lost(at, error):
                    return

    def _wait(self, host: int, ticket: Ticket) -> Reply | None:
        at, connections = self.host_map.hosts[host], self._context.connections
        while True:
            try:
                return connections.wait(at, ticket, self._policy.limit(), self._context.step)
            except RemoteError:
                raise
            except ChannelError as error:
                if not self._policy.lost(at, error):
                    return None
            part = self.slices[host]
            assert part is not None
            self._submit(host, part)
            ticket = self._tickets.pop(host)


__all__ = ["Exchange", "LossPolicy", "Reply"]
