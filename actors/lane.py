"""One lane of a router: a thread's calls to the expert hosts, over channels of its own.

Shapes: N tokens, D hidden, K experts per token; n rows and nnz (row, expert) pairs for one host.

Dispatch and combine are two autograd functions joined by an empty tensor, so that whatever the caller
computes between the two (the shared expert) overlaps with the tokens' way, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.mail import Array, Boxes, MailCall
from channels.base import Channel, Phase, Request, RequestId, Ticket
from channels.mailbox import MAX_ROWS
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, ProtocolError, RaymoeError, RemoteError, StaleEpoch
from model.dispatch import HostSlice, plan_dispatch
from model.experts import Pending

if TYPE_CHECKING:
    from actors.router import Placement, Router


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
        self._router = router
        self._channels: dict[str, Channel] = {}
        self._open: dict[tuple[int, int, int], Call | MailCall] = {}
        self._boxes = Boxes(self)
        self._step = 0
        self._microbatch = 0
        self.counters = LaneCounters()

    def begin(self, step: int, microbatch: int) -> None:
        """Start a microbatch: calls from here on carry its number, unique within the step and router."""
        if self._open:
            self.abandon()
        self._step, self._microbatch = step, microbatch

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """See `model.experts.Experts.dispatch`. Hosts keep activations only when a gradient can come back.

        Raises:
            ChannelError: a host cannot be reached (here or in `combine`), naming it.
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
            return self.send(layer, rows, idx, gates)
        call = Call(self, layer, idx, keep=keep, step=self._step, microbatch=self._microbatch)
        self._open[call.key] = call
        return _Sent(call, _Dispatch.apply(rows, gates, call))  # type: ignore[no-untyped-call]

    def dispatch_arrays(self, layer: int, rows: Array, idx: Array, gates: Array) -> MailCall | None:
        """See `model.experts.ArrayExperts.dispatch_arrays`: by mail, where every host looks into a mailbox.

        Raises:
            ChannelError: a host cannot be reached (here or in `add_to`), naming it.
        """
        placement = self._router.placement
        boxes = self._boxes.for_call(placement, rows, idx)
        if boxes is None:
            return None
        mail = MailCall(self, placement, boxes, (self._step, layer), rows, idx, gates)
        self._open[mail.key] = mail
        return mail

    def send(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Call:
        """Send a call of inference over the channels."""
        call = Call(self, layer, idx, keep=False, step=self._step, microbatch=self._microbatch)
        self._open[call.key] = call
        call.send(rows, gates)
        return call

    def abandon(self) -> None:
        """Give up what is under way (after an error): wait for replies, let hosts drop what they keep."""
        calls, self._open = list(self._open.values()), {}
        for call in calls:
            call.abandon()

    def close(self) -> None:
        """Hang up."""
        self._open.clear()
        self._boxes.clear()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def submit(self, host: HostInfo, request: Request) -> Ticket:
        """Send one request to a host, over this lane's channel to it."""
        try:
            channel = self._channels.get(host.id) or self._connect(host)
            self.counters.bytes += _bytes(request.tensors)
            return channel.submit(request)
        except RaymoeError as error:
            self.hang_up(host)
            raise _named(error, host) from error

    def channel(self, host: HostInfo) -> Channel:
        """The channel to a host, opened if there is none."""
        try:
            return self._channels.get(host.id) or self._connect(host)
        except RaymoeError as error:
            raise _named(error, host) from error

    def lost(self, host: HostInfo, error: RaymoeError) -> RaymoeError:
        """Hang up after an error, which comes back with the host's name."""
        self.hang_up(host)
        return _named(error, host)

    @property
    def timeout(self) -> float | None:
        """Seconds to wait for a reply."""
        return self._router.timeout

    def _connect(self, host: HostInfo) -> Channel:
        channel = self._channels[host.id] = self._router.connect(host)
        return channel

    def wait(self, host: HostInfo, ticket: Ticket) -> tuple[Tensor, ...]:
        """The reply of a host."""
        try:
            reply = ticket.result(self._router.timeout)
        except RaymoeError as error:
            if not isinstance(error, RemoteError):
                self.hang_up(host)
            raise _named(error, host) from error
        self.counters.bytes += _bytes(reply)
        return reply

    def reaches(self, host: HostInfo) -> bool:
        """Whether there is a channel to a host."""
        return host.id in self._channels

    def hang_up(self, host: HostInfo) -> None:
        """Close the channel to a host; the next request opens a new one."""
        channel = self._channels.pop(host.id, None)
        self._boxes.forget(host)
        if channel is not None:
            with suppress(RaymoeError):
                channel.close()

    def placement(self) -> Placement:
        """The placement that new calls use."""
        return self._router.placement

    def replan(self, error: StaleEpoch, call: Call) -> Placement:
        """A newer placement than the call's, which a host refused."""
        return self._router.replan(error, call.placement, step=call.step if call.keep else None)

    def done(self, call: Call | MailCall) -> None:
        """Nothing more will come of a call."""
        self._open.pop(call.key, None)

    def request_id(self, call: Call, phase: Phase, epoch: int) -> RequestId:
        """The id of one phase of a call."""
        return RequestId(
            run=self._router.run,
            epoch=epoch,
            step=call.step,
            microbatch=call.microbatch,
            layer=call.layer,
            phase=phase,
            router=self._router.name,
        )


class Call:
    """One MoE layer's way to the hosts and back, for one microbatch."""

    def __init__(
        self, lane: Lane, layer: int, idx: Tensor, *, keep: bool, step: int, microbatch: int
    ) -> None:
        self._lane = lane
        self._idx = idx
        self.keep = keep
        self.layer, self.step, self.microbatch = layer, step, microbatch
        self.placement = lane.placement()
        self._slices: tuple[HostSlice | None, ...] = ()
        self._tickets: dict[int, Ticket] = {}
        self._sent: tuple[Tensor, Tensor] | None = (
            None  # rows and gates, to send again until the reply is there
        )
        self._like: tuple[Tensor, Tensor]  # empty tensors of the rows' and gates' kind

    @property
    def key(self) -> tuple[int, int, int]:
        return (self.step, self.microbatch, self.layer)

    def send(self, rows: Tensor, gates: Tensor) -> None:
        """Submit the rows to every host that owns an expert of theirs."""
        held = self.placement
        self._slices = plan_dispatch(self._idx, gates, held.host_of(self.layer), len(held.hosts))
        self._sent = (rows, gates)
        self._like = (rows.new_empty(0, rows.shape[1]), gates.new_empty(0))
        id = self._lane.request_id(self, Phase.FORWARD if self.keep else Phase.INFER, held.epoch)
        sent = 0
        for host, part in enumerate(self._slices):
            if part is not None:
                payload = (_gather(rows, part), part.row_ptr, part.expert, part.gate)
                self._submit(host, Request(id=id, tensors=payload))
                sent += part.row.numel()
        counters = self._lane.counters
        counters.tokens += rows.shape[0]
        counters.rows += sent

    def combine(self) -> Tensor:
        """Wait for the hosts' partial sums and add them up: [N, D]."""
        while True:
            try:
                parts = self._collect()
                break
            except StaleEpoch as error:
                self._send_again(error)
        self._sent = None
        if self.keep:
            self.placement.trained(self.step)
        else:
            self._lane.done(self)
        return self._sum([part[0] if part else None for part in parts], self._like[0])

    def send_gradients(self, d_out: Tensor) -> None:
        """Submit the gradient of the sum to every host that had rows."""
        d_out = d_out.contiguous()
        id = self._lane.request_id(self, Phase.BACKWARD, self.placement.epoch)
        for host, part in enumerate(self._slices):
            if part is not None:
                self._submit(host, Request(id=id, tensors=(_gather(d_out, part),)))

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        """Wait for the gradients of rows [N, D] and gates [N, K]."""
        parts = self._collect()
        self._lane.done(self)
        like, gates = self._like
        d_rows = self._sum([part[0] if part else None for part in parts], like)
        d_gates = gates.new_zeros(self._idx.numel())
        for part, reply in zip(self._slices, parts, strict=True):
            if part is not None and reply is not None:
                d_gates[part.pair] = reply[1].to(d_gates.dtype)
        return d_rows, d_gates.view(self._idx.shape)

    def abandon(self) -> None:
        """Read the replies that are out, and let the hosts drop what they keep for this call."""
        with suppress(RaymoeError):
            self._collect()
        if self.keep:
            self.release()

    def release(self) -> None:
        """Let the hosts drop what they keep for this call; a host that is gone has dropped it."""
        id = self._lane.request_id(self, Phase.RELEASE, self.placement.epoch)
        for host, part in enumerate(self._slices):
            # Not over a new channel: reaching for a host that is gone would take its time, and one that
            # is there drops everything at the end of the step.
            if part is not None and self._lane.reaches(self.placement.hosts[host]):
                with suppress(RaymoeError):
                    self._submit(host, Request(id=id))
        with suppress(RaymoeError):
            self._collect()

    def _send_again(self, error: StaleEpoch) -> None:
        """Route again with the new placement; hosts that took the old request drop it."""
        assert self._sent is not None
        rows, gates = self._sent
        if self.keep:
            self.release()
        self.placement = self._lane.replan(error, self)
        self.send(rows, gates)

    def _submit(self, host: int, request: Request) -> None:
        self._tickets[host] = self._lane.submit(self.placement.hosts[host], request)

    def _collect(self) -> list[tuple[Tensor, ...] | None]:
        """The replies of all hosts, in their order. Every one is waited for, then the first error raised."""
        replies: list[tuple[Tensor, ...] | None] = [None] * len(self._slices)
        errors: list[RaymoeError] = []
        tickets, self._tickets = self._tickets, {}
        for host, ticket in tickets.items():
            try:
                replies[host] = self._lane.wait(self.placement.hosts[host], ticket)
            except RaymoeError as error:
                errors.append(error)
        if errors:
            # A stale epoch can be healed, so any other error goes first.
            raise min(errors, key=lambda error: isinstance(error, StaleEpoch))
        return replies

    def _sum(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """[N, D]: the hosts' rows added up, in the order of the hosts."""
        n = self._idx.shape[0]
        out: Tensor | None = None
        for part, rows in zip(self._slices, parts, strict=True):
            if part is None or rows is None:
                continue
            if out is None:
                out = (
                    rows
                    if rows.shape[0] == n
                    else like.new_zeros(n, rows.shape[1]).index_add_(0, part.row, rows)
                )
            elif rows.shape[0] == n:
                out += rows
            else:
                out.index_add_(0, part.row, rows)
        return like.new_zeros(n, like.shape[-1]) if out is None else out


class _Dispatch(torch.autograd.Function):
    """rows [N, D], gates [N, K] -> [0], with the rows on their way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, call: Call) -> Tensor:
        ctx.call = call
        call.send(rows, gates)
        return rows.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:
        d_rows, d_gates = ctx.call.receive_gradients()
        return d_rows, d_gates, None


class _Combine(torch.autograd.Function):
    """[0] -> [N, D], the sum over the hosts."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, call: Call) -> Tensor:
        ctx.call = call
        return call.combine()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        ctx.call.send_gradients(d_out)
        return d_out.new_empty(0), None


@dataclass(frozen=True, slots=True)
class _Sent:
    """A `Pending` with a gradient: joins `_Dispatch` to `_Combine`."""

    call: Call
    sent: Tensor

    def combine(self) -> Tensor:
        out: Tensor = _Combine.apply(self.sent, self.call)  # type: ignore[no-untyped-call]
        return out


def _gather(rows: Tensor, part: HostSlice) -> Tensor:
    """The rows of one host; all of them need no copy."""
    return rows if part.row.numel() == rows.shape[0] else rows.index_select(0, part.row)


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


__all__ = ["Call", "Lane", "LaneCounters"]
