"""One MoE layer's call of training to the expert hosts, with its way back for the gradients.

Dispatch and combine are two autograd functions joined by an empty tensor, so that whatever the caller
computes between the two (the shared expert) overlaps with the tokens' way, forward and backward.

A step is one version: a call stays with its hosts. Where a channel is dropped, the request goes again to the
same host, which tells by its id what it has done already (`actors.host.request_ledger`).
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from actors.router.device_rows import Outgoing
from actors.router.inference_call import Call, Reply
from channels.base import Phase, Request, Ticket
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, RaymoeError, RemoteError, StaleEpoch
from model.dispatch import HostSlice, plan_dispatch
from model.transfer import to_cpu, to_device

_REPEATS: Final = 3
"""Times that a request is sent again, each over a new channel."""
_PAUSE: Final = 0.05  # seconds before the second time; twice as long before the third


class TwoWay(Protocol):
    """What autograd takes a layer's rows and gradients by."""

    def send(self, rows: Tensor, gates: Tensor) -> None:
        """Rows [N, D] with gates [N, K] leave."""
        ...

    def combine(self) -> Tensor:
        """Wait for the sums [N, D]."""
        ...

    def send_gradients(self, d_out: Tensor) -> None:
        """The gradient [N, D] of the sums leaves."""
        ...

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        """Wait for the gradients of rows [N, D] and gates [N, K]."""
        ...


class TrainingCall(Call):
    """A call whose activations hosts keep until its gradients come, or it is released."""

    phase = Phase.FORWARD
    _sends_gradients = False

    def send(self, rows: Tensor, gates: Tensor) -> None:
        """Submit the rows to holders of their experts, each to one."""
        self._repeats: Counter[int] = Counter()
        super().send(rows, gates)

    def combine(self) -> Tensor:
        """Wait for the hosts' partial sums and add them up: [N, D]."""
        while True:
            try:
                parts = self._collect()
                break
            except StaleEpoch as error:
                self._send_again(error)
        self._sent = self._out = None
        self.placement.trained(self.step)
        return self._sum([part[0] if part else None for part in parts])

    def send_gradients(self, d_out: Tensor) -> None:
        """Submit the gradient of the sum to every host that had rows."""
        self._out, self._sends_gradients = Outgoing(d_out.contiguous()), True
        self._repeats.clear()
        for host, part in enumerate(self._slices):
            if part is not None:
                self._submit(host, part)

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        """Wait for the gradients of the rows [N, D] and of the gates [N, K]."""
        parts = self._collect()
        self._out, self._sends_gradients = None, False
        self._lane.done(self)
        d_rows = self._sum([part[0] if part else None for part in parts])
        d_gates = self._like[1].new_zeros(self._idx.numel())
        some = [(part, reply) for part, reply in zip(self._slices, parts, strict=True) if part and reply]
        for (part, _), of_pairs in zip(some, to_cpu(*(reply[1] for _, reply in some)), strict=True):
            d_gates[part.pair] = of_pairs.to(d_gates.dtype)
        return d_rows, d_gates.view(self._idx.shape)

    def abandon(self) -> None:
        """Read the replies that are out, and let the hosts drop what they keep for this call."""
        super().abandon()
        self.release()

    def release(self) -> None:
        """Let the hosts drop what they keep for this call; a host that is gone has dropped it."""
        request = Request(id=self._lane.request_id(self, Phase.RELEASE, self.placement.epoch))
        for host, part in enumerate(self._slices):
            # Not over a new channel: reaching for a host that is gone would take its time, and one that
            # is there drops everything at the end of the step.
            if part is not None and self._lane.reaches(self.placement.hosts[host]):
                with suppress(RaymoeError):
                    self._tickets[host] = self._lane.submit(self.placement.hosts[host], request)
        super().abandon()

    def _plan(self, gates: Tensor) -> tuple[HostSlice | None, ...]:
        held = self.placement
        if not held.covers(self.layer, self._idx):
            raise ChannelError(
                f"step {self.step} has no live expert host for some experts of layer {self.layer}"
                f" (epoch {held.epoch})"
            )
        # Whose turn it is among replicas follows from the microbatch: a step done again is the same step.
        return plan_dispatch(
            self._idx, gates, held.host_of(self.layer), len(held.hosts), shift=self.microbatch
        )

    def _request(self, host: HostInfo, part: HostSlice) -> Request:
        if not self._sends_gradients:
            return super()._request(host, part)
        id = self._lane.request_id(self, Phase.BACKWARD, self.placement.epoch)
        return Request(id=id, tensors=(self._rows(host, part),))

    def _submit(self, host: int, part: HostSlice) -> None:
        while True:
            try:
                at = self.placement.hosts[host]
                self._tickets[host] = self._lane.submit(at, self._request(at, part))
                return
            except ChannelError as error:
                self._refuse_to_repeat(host, error)

    def _wait(self, host: int, ticket: Ticket) -> Reply | None:
        while True:
            try:
                return self._lane.wait(self.placement.hosts[host], ticket, self._lane.router.timeout)
            except ChannelError as error:
                self._refuse_to_repeat(host, error)
            part = self._slices[host]
            assert part is not None
            self._submit(host, part)
            ticket = self._tickets.pop(host)

    def _refuse_to_repeat(self, host: int, error: ChannelError) -> None:
        """Raise an error that is an answer, or of a host that has had its time or its share of repeats."""
        repeats = self._repeats[host]
        answered = isinstance(error, (RemoteError, ChannelTimeout))
        if answered or repeats >= _REPEATS or not self._lane.router.counts_on(self.placement.hosts[host]):
            raise error
        if repeats:
            time.sleep(_PAUSE * 2 ** (repeats - 1))
        self._repeats[host] += 1

    def _send_again(self, error: StaleEpoch) -> None:
        """Route again with the new placement; hosts that took the old request drop it."""
        assert self._sent is not None
        self.release()
        self.placement = self._lane.router.replan(error, self.placement, step=self.step)
        self.send(*self._sent)


class _Dispatch(torch.autograd.Function):
    """rows [N, D], gates [N, K] -> [0], with the rows on their way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, here: Tensor, call: TwoWay) -> Tensor:
        ctx.call, ctx.device = call, gates.device
        call.send(rows, here)
        return rows.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_rows, d_gates = ctx.call.receive_gradients()
        return d_rows, to_device(d_gates, ctx.device), None, None


class _Combine(torch.autograd.Function):
    """[0] -> [N, D], the sum over the hosts."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, call: TwoWay) -> Tensor:
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

    call: TwoWay
    sent: Tensor

    def combine(self) -> Tensor:
        out: Tensor = _Combine.apply(self.sent, self.call)  # type: ignore[no-untyped-call]
        return out


def dispatched(call: TwoWay, rows: Tensor, gates: Tensor, here: Tensor) -> _Sent:
    """A call with its rows on their way, as a `Pending` that gradients come back through.

    Args:
        here: the gates in the CPU's memory, without a gradient.
    """
    return _Sent(call, _Dispatch.apply(rows, gates, here, call))  # type: ignore[no-untyped-call]


__all__ = ["TrainingCall", "TwoWay", "dispatched"]
