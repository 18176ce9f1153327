"""One lane of a router: the calls to the expert hosts of one thread, over channels of its own.

Shapes: N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from actors.router.call_context import CallContext, OpenCalls, ReplicaShifts
from actors.router.connections import Connections, LaneCounters
from actors.router.host_map import HostMap
from actors.router.inference_call import InferenceCall
from actors.router.mailbox_call import LaneMailboxes, MailboxCall
from actors.router.reroute import Reroute
from actors.router.routing import Routing
from actors.router.training_call import TrainingCall, dispatched
from channels.base import MAX_MAILBOX_ROWS
from model.device_copies import to_cpu
from model.experts.protocols import Pending

Array = npt.NDArray[Any]


class Lane:
    """Implements `Experts` and `ArrayExperts` for one thread at a time; made by `Router`.

    Args:
        run, router: Names in request ids.
    """

    def __init__(self, run: str, router: str, routing: Routing, connections: Connections) -> None:
        self._routing, self._connections = routing, connections
        self._mailboxes = LaneMailboxes(connections)
        self._open_calls = OpenCalls()
        self._context = CallContext(
            routing=routing,
            connections=connections,
            open_calls=self._open_calls,
            shifts=ReplicaShifts(),
            run=run,
            router=router,
            step=0,
            microbatch=0,
        )

    @property
    def counters(self) -> LaneCounters:
        """Traffic of this lane."""
        return self._connections.counters

    @property
    def connections(self) -> Connections:
        """The lane's channels to the hosts."""
        return self._connections

    def begin(self, step: int, microbatch: int) -> None:
        """Start a microbatch: calls from here on carry its number, unique within the step and router."""
        self._open_calls.abandon()
        self._connections.close_cut()
        self._context = replace(self._context, step=step, microbatch=microbatch)

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """Send rows [N, D] to the experts idx [N, K] of a layer; hosts keep activations only for gradients.

        Raises:
            ChannelError: A host cannot be reached (here or in `combine`), and no other can replace it; names
                the host.
            ProtocolError: The layer has no routed experts.
        """
        if needs_gradient(rows, gates):
            here_idx, here_gates = to_cpu(idx, gates.detach())
            return dispatched(self.training_call(layer, here_idx), rows, gates, here_gates)
        few = rows.shape[0] <= MAX_MAILBOX_ROWS and rows.dtype in (torch.float32, torch.float64)
        if few and rows.device.type == "cpu":
            arrays = rows.detach().contiguous().numpy(), idx.numpy(), gates.detach().numpy()
            call = self.dispatch_arrays(layer, *arrays)
            if call is not None:
                return call
        here_idx, here_gates = to_cpu(idx, gates)
        host_map, reroute = self._route(layer, here_idx)
        return InferenceCall(self._context, layer, rows, here_idx, here_gates, host_map, reroute)

    def training_call(self, layer: int, idx: Tensor) -> TrainingCall:
        """A call whose rows have not been sent yet; idx [N, K] in the CPU's memory."""
        return TrainingCall(self._context, layer, idx)

    def dispatch_arrays(self, layer: int, rows: Array, idx: Array, gates: Array) -> MailboxCall | None:
        """`dispatch` for inference through mailboxes; None where a host reads none.

        Raises:
            ChannelError: A host cannot be reached (here or in `add_to`), and no other can replace it; names
                the host.
        """
        host_map, reroute = self._route(layer, idx)
        mailboxes = self._mailboxes.for_call(host_map, rows, idx)
        if mailboxes is None:
            return None
        return MailboxCall(self._context, host_map, mailboxes, layer, rows, idx, gates, reroute)

    def abandon(self) -> None:
        """Abandon the open calls after an error: read their replies, and let hosts drop what they keep."""
        self._open_calls.abandon()

    def raise_deferred(self) -> None:
        """Raise an error that passes have deferred; a plain lane defers none."""

    def close(self) -> None:
        """Close all channels."""
        self._open_calls.clear()
        self._connections.close()

    def _route(self, layer: int, idx: Tensor | Array) -> tuple[HostMap, Reroute | None]:
        """A map for a new call of inference, and the search for it, if it took one."""
        host_map = self._routing.route()
        if host_map.covers(layer, idx):
            return host_map, None
        reroute = Reroute(self._routing, layer, idx)
        return reroute.begin(), reroute


def needs_gradient(rows: Tensor, gates: Tensor) -> bool:
    """Whether a gradient can come back to rows or gates."""
    return torch.is_grad_enabled() and (rows.requires_grad or gates.requires_grad)


__all__ = ["Lane", "needs_gradient"]
