"""What the calls of one lane share: routing, connections, and the names of their requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from actors.router.connections import Connections
from actors.router.routing import Routing
from channels.base import Phase, RequestId

CallKey = tuple[int, int, int]
"""Step, microbatch and layer of a call; the microbatch is -1 for calls through mailboxes."""


class OpenCall(Protocol):
    """A call that is not over: its replies, or its gradients, are still to come."""

    @property
    def key(self) -> CallKey: ...

    def abandon(self) -> None:
        """Read the replies that are due, and let the hosts drop what they keep for the call."""
        ...


class OpenCalls:
    """The calls of a lane that are not over."""

    def __init__(self) -> None:
        self._calls: dict[CallKey, OpenCall] = {}

    def add(self, call: OpenCall) -> None:
        self._calls[call.key] = call

    def over(self, call: OpenCall) -> None:
        """Remove a completed call."""
        self._calls.pop(call.key, None)

    def abandon(self) -> None:
        """Abandon all calls."""
        if self._calls:
            calls, self._calls = list(self._calls.values()), {}
            for call in calls:
                call.abandon()

    def clear(self) -> None:
        """Remove all calls, whose channels are about to be closed."""
        self._calls.clear()


class ReplicaShifts:
    """Chooses the replicas that a lane's calls begin with, evenly for any number of layers.

    Shifts by multiples of the golden ratio, so that replicas are used evenly whatever the number of layers.
    """

    def __init__(self) -> None:
        self._calls = 0

    def next(self) -> int:
        """The shift of the next call, see `model.dispatch.plan_dispatch`."""
        self._calls += 1
        return (self._calls * 0x9E3779B1 & 0xFFFFFFFF) * 27720 >> 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext:
    """The parts of a lane that its calls of one microbatch use.

    Attributes:
        run, router: Names in request ids.
        step, microbatch: Numbers in request ids.
    """

    routing: Routing
    connections: Connections
    open_calls: OpenCalls
    shifts: ReplicaShifts
    run: str
    router: str
    step: int
    microbatch: int

    def request_id(self, layer: int, phase: Phase, epoch: int) -> RequestId:
        """The id of one phase of a call."""
        return RequestId(self.run, epoch, self.step, self.microbatch, layer, phase, self.router)


__all__ = ["CallContext", "CallKey", "OpenCall", "OpenCalls", "ReplicaShifts"]
