"""What an expert host remembers of the requests of a step, so that every one of them can come twice."""

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
class Backward:
    """One BACKWARD: in progress until it is finished, then its reply, or the text of what went wrong."""

    key: Key
    reply: tuple[Tensor, ...] | None = None
    error: str | None = None
    _done: threading.Event = field(default_factory=threading.Event)

    def finish(self) -> None:
        """There is a reply, or an error."""
        self._done.set()

    def wait(self, timeout: float) -> tuple[Tensor, ...]:
        """The reply, once whoever computes it is done."""
        if not self._done.wait(timeout):
            raise RaymoeError(f"the same BACKWARD is still being computed after {timeout:g} s")
        if self.reply is None:
            raise RaymoeError(f"this BACKWARD failed the first time: {self.error}")
        return self.reply


class Ledger:
    """Activations by key, and the last BACKWARD of each lane, a lane being a (router, microbatch).

    A router runs one microbatch's calls in order, so any later request of the lane says that the
    reply of the BACKWARD before it has arrived. A repeat of an earlier request, which may come late from a
    connection that the router has given up, says nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._saved: dict[Key, SavedForward] = {}
        self._last: dict[LaneKey, Backward] = {}
        self._applied: set[Key] = set()

    def keep(self, id: RequestId, saved: SavedForward) -> None:
        """Keep the activations of a FORWARD until its BACKWARD; a repeat replaces them.

        A FORWARD whose BACKWARD has been applied (it was delayed, or is computed again) keeps nothing.
        """
        with self._lock:
            if id.key in self._applied:
                return
            if id.key not in self._saved:
                self._acknowledge(id)
            self._saved[id.key] = saved

    def release(self, id: RequestId) -> None:
        """Drop the activations of a call, if there are any."""
        with self._lock:
            self._acknowledge(id)
            self._saved.pop(id.key, None)

    def begin_backward(self, id: RequestId) -> tuple[Backward, SavedForward | None]:
        """The BACKWARD of this id, and the activations if the caller is the one who has to compute it.

        Raises:
            ProtocolError: no FORWARD of this key, or a repeat of a BACKWARD whose reply is gone.
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
            call = Backward(id.key)
            self._last[_lane(id)] = call
            self._applied.add(id.key)
            return call, saved

    def clear(self) -> int:
        """Forget everything (a step ended); the number of activations that were never used."""
        with self._lock:
            unused = len(self._saved)
            self._saved.clear()
            self._last.clear()
            self._applied.clear()
            return unused

    def kept(self) -> tuple[int, int]:
        """Activations kept and their bytes."""
        with self._lock:
            kept = tuple(self._saved.values())
        return len(kept), sum(
            tensor.nbytes for saved in kept for tensor in (saved.rows, saved.hidden, saved.gate)
        )

    def _acknowledge(self, id: RequestId) -> None:
        """Drop the lane's last reply when this is a later call."""
        lane = _lane(id)
        last = self._last.get(lane)
        if last is not None and last.key != id.key:
            del self._last[lane]


def _lane(id: RequestId) -> LaneKey:
    return (id.run, id.router, id.microbatch)


__all__ = ["Backward", "Ledger"]
