"""One lane of a router: a thread's calls to the expert hosts, over channels of its own.

Shapes: N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actors.router.channel_opening import GONE, open_unless
from actors.router.inference_call import Call
from actors.router.mailbox_calls import Array, Boxes, MailCall
from actors.router.reroute import MOST_HEDGED, Detour
from actors.router.routes import Placement
from actors.router.training_call import TrainingCall, dispatched
from channels.base import Channel, Phase, Request, RequestId, Ticket
from channels.shm.mailbox import MAX_ROWS
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, ProtocolError, RaymoeError, RemoteError, StaleEpoch
from model.experts import Pending
from model.transfer import to_cpu

if TYPE_CHECKING:
    from actors.router.router import Router


@dataclass(slots=True)
class LaneCounters:
    """What went through; only ever grows.

    Attributes:
        tokens: (token, layer) pairs dispatched.
        rows: rows sent to hosts; rows / tokens = hosts per token.
        bytes: payload of requests and replies.
    """

    tokens: int = 0
    rows: int = 0
    bytes: int = 0


class Lane:
    """Implements `model.experts.Experts` for one thread at a time; made by `Router.lane`."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.counters = LaneCounters()
        self._channels: dict[str, Channel] = {}
        self._gone: set[str] = set()  # hosts that are in no table any more
        self._ended: deque[str] = deque()  # of these, whose channels this thread has yet to close
        self._open: dict[tuple[int, int, int], Call | MailCall] = {}
        self._boxes = Boxes(self)
        self._step = 0
        self._microbatch = 0
        self._calls = 0

    def begin(self, step: int, microbatch: int) -> None:
        """Start a microbatch: calls from here on carry its number, unique within the step and router."""
        if self._open:
            self.abandon()
        while self._ended:
            self._hang_up(self._ended.popleft())
        self._step, self._microbatch = step, microbatch

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """See `model.experts.Experts.dispatch`. Hosts keep activations only when a gradient can come back.

        Raises:
            ChannelError: a host cannot be reached (here or in `combine`), naming it, nor others in its place.
            ProtocolError: a layer without routed experts.
        """
        keep = torch.is_grad_enabled() and (rows.requires_grad or gates.requires_grad)
        if not keep:
            few = rows.shape[0] <= MAX_ROWS and rows.dtype in (torch.float32, torch.float64)
            if few and rows.device.type == "cpu":
                arrays = rows.detach().contiguous().numpy(), idx.numpy(), gates.detach().numpy()
                mail = self.dispatch_arrays(layer, *arrays)
                if mail is not None:
                    return mail
            here_idx, here_gates = to_cpu(idx, gates)
            placement, detour = self._route(layer, here_idx)
            return self.send(layer, rows, here_idx, here_gates, placement, detour)
        here_idx, here_gates = to_cpu(idx, gates.detach())
        placement = self.router.pin(self._step)
        call = TrainingCall(self, layer, here_idx, placement, step=self._step, microbatch=self._microbatch)
        self._open[call.key] = call
        return self._train(call, rows, gates, here_gates)

    def dispatch_arrays(self, layer: int, rows: Array, idx: Array, gates: Array) -> MailCall | None:
        """See `model.experts.ArrayExperts.dispatch_arrays`: by mail, where every host looks into a mailbox.

        Raises:
            ChannelError: a host cannot be reached (here or in `add_to`), naming it, nor others in its place.
        """
        placement, detour = self._route(layer, idx)
        boxes = self._boxes.for_call(placement, rows, idx)
        if boxes is None:
            return None
        mail = MailCall(self, placement, boxes, (self._step, layer), rows, idx, gates, detour)
        self._open[mail.key] = mail
        return mail

    def send(
        self,
        layer: int,
        rows: Tensor,
        idx: Tensor,
        gates: Tensor,
        placement: Placement,
        detour: Detour | None,
    ) -> Call:
        """Send a call of inference over the channels."""
        call = Call(self, layer, idx, placement, step=self._step, microbatch=self._microbatch, detour=detour)
        self._open[call.key] = call
        call.send(rows, gates)
        return call

    def abandon(self) -> None:
        """Give up what is under way (after an error): wait for replies, let hosts drop what they keep."""
        calls, self._open = list(self._open.values()), {}
        for call in calls:
            call.abandon()

    def settle(self) -> None:
        """After passes: raise a loss that they have outlasted; here they outlast none, see `EnduringLane`."""

    def close(self) -> None:
        """Hang up."""
        self._open.clear()
        self._boxes.clear()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def cut(self, gone: Collection[str], there: Collection[str]) -> None:
        """End whatever waits for hosts that are gone. Any thread."""
        self._gone = (self._gone | set(gone)) - set(there)
        for host_id in gone:
            channel = self._channels.get(host_id)
            if channel is not None:
                channel.cut(GONE)
                self._ended.append(host_id)

    def submit(self, host: HostInfo, request: Request) -> Ticket:
        """Send one request to a host, over this lane's channel to it."""
        try:
            channel = self._channels.get(host.id) or self._connect(host)
            self.counters.bytes += _bytes(request.tensors)
            return channel.submit(request)
        except RaymoeError as error:
            raise self.lost(host, error) from error

    def takes(self, host: HostInfo, device: torch.device) -> bool:
        """Whether the channel to a host takes tensors of a device as they are.

        Raises:
            ChannelError: there is no way to the host.
        """
        return device.type == "cpu" or self.channel(host).takes(device)

    def channel(self, host: HostInfo) -> Channel:
        """The channel to a host, opened if there is none."""
        try:
            return self._channels.get(host.id) or self._connect(host)
        except RaymoeError as error:
            raise _named(error, host) from error

    def wait(self, host: HostInfo, ticket: Ticket, timeout: float | None) -> tuple[Tensor, ...]:
        """The reply of a host."""
        turns, timeline = self.router.turns, self.router.timeline
        try:
            with (
                nullcontext() if turns is None else turns.away(),
                nullcontext() if timeline is None else timeline.span(self._step, f"wait for {host.id}"),
            ):
                reply = ticket.result(timeout)
        except RemoteError as error:
            raise _named(error, host) from error
        except RaymoeError as error:
            raise self.lost(host, error) from error
        self.counters.bytes += _bytes(reply)
        return reply

    def lost(self, host: HostInfo, error: RaymoeError) -> RaymoeError:
        """Hang up after an error, which comes back with the host's name."""
        self._hang_up(host.id)
        return _named(error, host)

    def reaches(self, host: HostInfo) -> bool:
        """Whether there is a channel to a host."""
        return host.id in self._channels

    def limit(self, placement: Placement, layer: int, detour: Detour | None) -> tuple[float | None, bool]:
        """Seconds to wait for a reply, and whether others are asked after them."""
        timeout, hedge_after = self.router.timeout, self.router.hedge_after
        if hedge_after is None or not placement.spare(layer):
            return timeout, False
        enough = detour is not None and detour.hedged >= MOST_HEDGED
        if enough or (timeout is not None and timeout <= hedge_after):
            return timeout, False
        return hedge_after, True

    def placement(self) -> Placement:
        """The placement that new calls use."""
        return self.router.placement

    def next_shift(self) -> int:
        """Which replicas the next call begins with: in turns, whatever the number of layers.

        Multiples of the golden ratio are spread evenly, and so is every k-th of them: with a mere count, a
        layer would have the same replicas in every step where the number of layers is a multiple of theirs.
        """
        self._calls += 1
        return (self._calls * 0x9E3779B1 & 0xFFFFFFFF) * 27720 >> 32

    def done(self, call: Call | MailCall) -> None:
        """Nothing more will come of a call."""
        self._open.pop(call.key, None)

    def request_id(self, call: Call, phase: Phase, epoch: int) -> RequestId:
        """The id of one phase of a call."""
        return RequestId(
            run=self.router.run,
            epoch=epoch,
            step=call.step,
            microbatch=call.microbatch,
            layer=call.layer,
            phase=phase,
            router=self.router.name,
        )

    def _train(self, call: TrainingCall, rows: Tensor, gates: Tensor, here_gates: Tensor) -> Pending:
        return dispatched(call, rows, gates, here_gates)

    def _route(self, layer: int, idx: Tensor | Array) -> tuple[Placement, Detour | None]:
        """A placement for a new call of inference, and the search for it, if it took one."""
        placement = self.router.route()
        if placement.covers(layer, idx):
            return placement, None
        detour = Detour(self.router, layer, idx)
        return detour.begin(), detour

    def _connect(self, host: HostInfo) -> Channel:
        def gone() -> bool:
            return host.id in self._gone

        connect = self.router.connect
        channel = open_unless(gone, connect, host) if self.router.watches else connect(host)
        self._channels[host.id] = channel
        if gone():  # in the meantime, so that nobody has cut the channel
            raise ChannelError(GONE)
        return channel

    def _hang_up(self, host_id: str) -> None:
        """Close the channel to a host; the next request opens a new one."""
        channel = self._channels.pop(host_id, None)
        self._boxes.forget(host_id)
        if channel is not None:
            with suppress(RaymoeError):
                channel.close()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _named(error: RaymoeError, host: HostInfo) -> RaymoeError:
    """The same error with the host's name and addresses."""
    text = f"expert host {host.id} ({', '.join(host.addresses.values()) or 'in process'}): {error}"
    if isinstance(error, StaleEpoch):
        return StaleEpoch(text, epoch=error.epoch)
    for kind in (ChannelTimeout, RemoteError, ChannelError):
        if isinstance(error, kind):
            return kind(text)
    return ProtocolError(text) if isinstance(error, ProtocolError) else error


__all__ = ["Lane", "LaneCounters"]
