"""A training call of one MoE layer: dispatch, combine, and their gradients.

Dispatch and combine are two autograd functions joined by an empty tensor, so that what the caller
computes between the two (the shared expert) overlaps with the exchange with the hosts, forward and backward.

A training call stays with its hosts. After a dropped connection the request is retried at the same host,
whose ledger recognises its id (`actors.host.request_ledger`).

Shapes: N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from actors.router.call_context import CallContext, CallKey
from actors.router.exchange import Exchange
from actors.router.routing import Routing
from channels.base import Phase
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, StaleEpoch
from model.device_copies import to_cpu, to_device

_MAX_REPEATS: Final = 3
"""Times that a request is retried, each over a new channel."""
_PAUSE: Final = 0.05  # seconds before the second retry; twice as long before the third


class TwoWay(Protocol):
    """A layer's call and its gradients, as autograd uses them."""

    def send(self, rows: Tensor, gates: Tensor) -> None:
        """Send rows [N, D] with gates [N, K]."""
        ...

    def combine(self) -> Tensor:
        """Wait for the sums [N, D]."""
        ...

    def send_gradients(self, d_out: Tensor) -> None:
        """Send the gradient [N, D] of the sums."""
        ...

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        """Wait for the gradients of rows [N, D] and gates [N, K]."""
        ...


class Repeat:
    """The loss policy of training: a lost request is retried at the same host."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._repeats: Counter[str] = Counter()

    def begin(self) -> None:
        """Begin a direction of the call, with the full number of retries for every host."""
        self._repeats.clear()

    def limit(self) -> float | None:
        return self._routing.timeout

    def lost(self, host: HostInfo, error: ChannelError) -> bool:
        """Retry unless the reply timed out, the retries are used up, or the host has left the table."""
        repeats = self._repeats[host.id]
        if isinstance(error, ChannelTimeout) or repeats >= _MAX_REPEATS or not self._routing.counts_on(host):
            raise error
        if repeats:
            time.sleep(_PAUSE * 2 ** (repeats - 1))
        self._repeats[host.id] += 1
        return True


class TrainingCall:
    """A call whose activations hosts keep until its gradients come, or it is released; a `TwoWay`.

    Args:
        idx: [N, K], in the CPU's memory.
    """

    _no_gates: Tensor  # [0], of the gates' type

    def __init__(self, context: CallContext, layer: int, idx: Tensor) -> None:
        self._context, self._layer, self._idx = context, layer, idx
        self._host_map = context.routing.pin(context.step)
        self._repeat = Repeat(context.routing)
        self._exchange = Exchange(context, layer, idx, self._repeat)
        self._sent: tuple[Tensor, Tensor] | None = None  # rows and gates, until the reply is there
        self.key: CallKey = (context.step, context.microbatch, layer)
        context.open_calls.add(self)

    def send(self, rows: Tensor, gates: Tensor) -> None:
        """Send rows [N, D] with gates [N, K], which lie in the CPU's memory.

        Raises:
            ChannelError: A host cannot be reached, or no host holds an expert of the call.
        """
        self._repeat.begin()
        if not self._host_map.covers(self._layer, self._idx):
            raise ChannelError(
                f"step {self._context.step} has no live expert host for some experts of layer {self._layer}"
                f" (epoch {self._host_map.epoch})"
            )
        self._sent, self._no_gates = (rows, gates), gates.new_empty(0)
        # The replicas follow from the microbatch: a step that is repeated is the same step.
        self._exchange.send(self._host_map, Phase.FORWARD, rows, gates, self._context.microbatch)

    def combine(self) -> Tensor:
        while True:
            try:
                replies = self._exchange.collect()
                break
            except StaleEpoch as error:
                self._send_again(error)
        self._sent = None
        self._host_map.trained(self._context.step)
        return self._exchange.combine(replies)

    def send_gradients(self, d_out: Tensor) -> None:
        self._repeat.begin()
        self._exchange.send_gradients(d_out)

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        replies = self._exchange.collect()
        self._context.open_calls.over(self)
        d_rows = self._exchange.combine(replies)
        d_gates = self._no_gates.new_zeros(self._idx.numel())
        parts = zip(self._exchange.slices, replies, strict=True)
        some = [(part, reply) for part, reply in parts if part and reply]
        for (part, _), of_pairs in zip(some, to_cpu(*(reply[1] for _, reply in some)), strict=True):
            d_gates[part.pair] = of_pairs.to(d_gates.dtype)
        return d_rows, d_gates.view(self._idx.shape)

    def abandon(self) -> None:
        self._exchange.drain()
        self._exchange.release()

    def _send_again(self, error: StaleEpoch) -> None:
        """Send with a newer placement; hosts that took the old request drop it."""
        assert self._sent is not None
        self._exchange.release()
        self._host_map = self._context.routing.replan(error, self._host_map, step=self._context.step)
        self.send(*self._sent)


class _Dispatch(torch.autograd.Function):
    """rows [N, D], gates [N, K] -> [0], with the rows in flight."""

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
class _Dispatched:
    """A `Pending` with a gradient: joins `_Dispatch` to `_Combine`."""

    call: TwoWay
    sent: Tensor

    def combine(self) -> Tensor:
        out: Tensor = _Combine.apply(self.sent, self.call)  # type: ignore[no-untyped-call]
        return out


def dispatched(call: TwoWay, rows: Tensor, gates: Tensor, here: Tensor) -> _Dispatched:
    """A `Pending` for rows that the call has sent, through which gradients come back.

    Args:
        here: The gates in the CPU's memory, without a gradient.
    """
    return _Dispatched(call, _Dispatch.apply(rows, gates, here, call))  # type: ignore[no-untyped-call]


__all__ = ["Repeat", "TrainingCall", "TwoWay", "dispatched"]
