"""The requests of a step that an expert host has seen, which makes every request idempotent.

A router that loses its connection in a forward or backward pass sends the same request again, with the same
`RequestId`. The ledger keeps the activations of a FORWARD until its BACKWARD, and the reply of a BACKWARD
until a later request of the same lane shows that it has arrived. So a retried BACKWARD adds its gradients
once and gets the reply of the first, and a FORWARD that is delayed or retried leaks no activations.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor

from channels.base import RequestId
from errors import ProtocolError, RaymoeError
from model.experts.grouped_swiglu import SavedForward

Key = tuple[str, int, int, int, str]
LaneKey = tuple[str, str, int]


@dataclass(slots=True)
class BackwardCall:
    """One BACKWARD: under way, or finished with a reply or an error text."""

    key: Key
    reply: tuple[Tensor, ...] | None = None
    error: str | None = None
    _done: threading.Event = field(default_factory=threading.Event)

    def finish(self) -> None:
        """Wake the threads that wait for the reply."""
        self._done.set()

    def wait(self, timeout: float) -> tuple[Tensor, ...]:
        """Wait until the reply has been computed, and return it.

        Raises:
            RaymoeError: the computation failed, or took longer than `timeout` seconds.
        """
        if not self._done.wait(timeout):
            raise RaymoeError(f"the same BACKWARD is still being computed after {timeout:g} s")
        if self.reply is None:
            raise RaymoeError(f"this BACKWARD failed the first time: {self.error}")
        return self.reply


class RequestLedger:
    """Activations by key, and the last BACKWARD of each lane, identified by run, router and microbatch.

    A router sends the calls of a microbatch in order, so any later request of the lane acknowledges the
    reply of the BACKWARD before it. A retry of an earlier request, which may arrive late over an abandoned
    connection, acknowledges nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._saved: dict[Key, SavedForward] = {}
        self._last: dict[LaneKey, BackwardCall] = {}
        self._applied: set[Key] = set()

    def keep(self, id: RequestId, saved: SavedForward) -> None:
        """Keep the activations of a FORWARD until its BACKWARD; a retry replaces them.

        A FORWARD whose BACKWARD has been applied already keeps nothing.
        """
        with self._lock:
            if id.key in self._applied:
                return
            if id.key not in self._saved:
                self._acknowledge(id)
            self._saved[id.key] = saved

    def release(self, id: RequestId) -> None:
        """Drop the activations of a call, if any are kept."""
        with self._lock:
            self._acknowledge(id)
            self._saved.pop(id.key, None)

    def begin_backward(self, id: RequestId) -> tuple[BackwardCall, SavedForward | None]:
        """The BACKWARD of this id, and its activations if the caller has to compute it.

        For a retry the activations are None, and the caller waits for the reply of the first.

        Raises:
            ProtocolError: there was no FORWARD of this key, or the BACKWARD's reply has been acknowledged.
        """
        with self._lock:
            last = self._last.get(_lane(id))
            if last is not None and last.key == id.key:
                return last, None
            if id.key not in self._applied:
                self._acknowledge(id)
            saved = self._saved.pop(id.key, None)
            if saved is None:
                known = (
                    "was applied and its reply acknowledged" if id.key in self._applied else "has no FORWARD"
                )
                raise ProtocolError(
                    f"BACKWARD of layer {id.layer}, step {id.step}, microbatch {id.microbatch} of router "
                    f"{id.router!r} {known}; a router sends FORWARD, then BACKWARD once per call"
                )
            call = BackwardCall(id.key)
            self._last[_lane(id)] = call
            self._applied.add(id.key)
            return call, saved

    def clear(self) -> int:
        """Forget all requests, at the end of a step; returns the number of unused activations."""
        with self._lock:
            unused = len(self._saved)
            self._saved.clear()
            self._last.clear()
            self._applied.clear()
            return unused

    def kept(self) -> tuple[int, int]:
        """Number of activations kept, and their bytes."""
        with self._lock:
            kept = tuple(self._saved.values())
        return len(kept), sum(
            tensor.nbytes for saved in kept for tensor in (saved.rows, saved.hidden, saved.gate)
        )

    def _acknowledge(self, id: RequestId) -> None:
        """Drop the last reply of the lane if this is a later call."""
        lane = _lane(id)
        last = self._last.get(lane)
        if last is not None and last.key != id.key:
            del self._last[lane]


def _lane(id: RequestId) -> LaneKey:
    return (id.run, id.router, id.microbatch)


__all__ = ["BackwardCall", "RequestLedger"]
